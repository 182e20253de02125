# SPDX-License-Identifier: Apache-2.0
"""From documents to records: what the model is asked, what is counted, what an interruption leaves behind."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from longpo_jax.config import (
    CorpusConfig,
    ExcerptsConfig,
    GenerationConfig,
    InstructConfig,
    LongPOConfig,
    PairsConfig,
    PolicyConfig,
)
from longpo_jax.dialogue import Dialogue
from longpo_jax.excerpts import excerpts_of, middle_of
from longpo_jax.instruct import OPENERS, parsed, request
from longpo_jax.journal import Writer
from longpo_jax.pairs import run_pairs
from longpo_jax.records import Answer, Record, read_records
from longpo_jax.stages import summary_of
from rapid_jax.model.tokenizer import Tokenizer, tokenizer_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from tests.tiny_models import save_decoder, words

DOCUMENTS = 7  # long enough; one more is not, and one has no excerpt


def tiny_corpus(root: Path, long: int, *, batch: int, temperature: float) -> LongPOConfig:
    """So many documents long enough, one that is not, and one without an excerpt; and a model for them."""
    save_decoder(root / "model")
    (root / "books").mkdir()
    for index in range(long):
        (root / "books" / f"{index}.txt").write_text(words(50, seed=index))
    (root / "books" / "short.txt").write_text(words(20))
    (root / "books" / "flat.txt").write_text("\n\n".join(("w1" * 20, "w2" * 22, "w3" * 20)))
    pairs = {"max_context": 1024, "batch": batch, "min_words": 0, "repeats_chosen": 1.0, "shard_pairs": 2}
    return LongPOConfig(
        model=PolicyConfig(source=str(root / "model"), dtype="float32"),
        corpus=CorpusConfig(sources=(f"book={root / 'books'}",), min_tokens=100, max_tokens=400),
        excerpts=ExcerptsConfig(min_tokens=48, max_tokens=80, per_document=2),
        instruct=InstructConfig(temperature=1.0, top_p=1.0, max_new_tokens=12),
        pairs=PairsConfig(temperature=temperature, max_new_tokens=12, **pairs),
        generation=GenerationConfig(prefill_chunk=64, attention_block=512),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> LongPOConfig:
    return tiny_corpus(tmp_path_factory.mktemp("pairs"), DOCUMENTS, batch=3, temperature=1.0)


@pytest.fixture(scope="module")
def tokenizer(config) -> Tokenizer:
    return tokenizer_of(Path(config.model.source))


@pytest.fixture(autouse=True)
def questions(monkeypatch):
    """A tiny model does not write questions: some are made of its words, for most words."""

    def parsed(text: str, config: InstructConfig) -> list[str]:
        number = sum(map(ord, text))
        return [f"w{number % 97} w{index}?" for index in range(config.questions)] if number % 5 else []

    monkeypatch.setattr("longpo_jax.instruct.parsed", parsed)


@dataclass
class Engine:
    """Stands in for the model. Like rounding, what it says depends on the seed and on all that a call is given."""

    tokenizer: Tokenizer
    weights: str = "w"
    calls: list[tuple[str, list[list[int]]]] = field(default_factory=list)
    drafts: list[Any] = field(default_factory=list)
    says: str | None = None

    @property
    def identity(self) -> dict[str, str]:
        return {"model.weights": self.weights}

    def answers(self, prompts: Sequence[list[int]], sampling, seeds: Sequence[int]) -> list[Answer]:
        self.calls.append(("answers", list(prompts)))
        return self._say(prompts, sampling, seeds)

    def answers_about(self, asked, sampling, seeds) -> list[list[Answer]]:
        found = []
        for about, own in zip(asked, seeds, strict=True):
            prompts = [about.head + tail for tail in about.tails]
            if prompts:
                self.calls.append(("about", prompts))
                self.drafts.append(about.drafts)
            found.append(self._say(prompts, sampling, own))
        return found

    def _say(self, prompts, sampling, seeds) -> list[Answer]:
        drawn = [random.Random(digest(repr(prompts), repr(sampling), repr(seed), self.weights)) for seed in seeds]
        texts = [self.says or words(rng.randrange(5, 12), seed=rng.randrange(10**6)) for rng in drawn]
        return [Answer(text, len(text.split()), rng.random() < 0.5) for text, rng in zip(texts, drawn, strict=True)]


QUESTIONS = "Why of w1?\n2: What of w2?"


@pytest.fixture
def engine(tokenizer, monkeypatch) -> Engine:
    engine = Engine(tokenizer)
    monkeypatch.setattr("longpo_jax.pairs.Generator", lambda config, quiet: engine)
    monkeypatch.setattr("rapid_jax.runtime.append_log.os.fsync", lambda descriptor: None)
    return engine


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "pairs").iterdir()}


def made(config: LongPOConfig, folder: Path) -> tuple[list[Record], dict[str, Any]]:
    run_pairs(config, folder, quiet=True)
    return list(read_records(folder / "pairs")), summary_of(folder / "pairs")


def interrupt(monkeypatch, after: int) -> None:
    """The next run dies when its (after + 1)th document is about to be written."""
    add, left = Writer.add, [after]

    def die(self, id, record, counts):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, id, record, counts)

    monkeypatch.setattr(Writer, "add", die)


def test_every_document_and_every_excerpt_is_accounted_for(config, engine, tmp_path, capsys):
    run_pairs(config, tmp_path)
    records, summary = list(read_records(tmp_path / "pairs")), summary_of(tmp_path / "pairs")
    turns = [turn for record in records for turn in record.turns]
    assert summary["documents"] == DOCUMENTS + 1 and summary["corpus_dropped"] == {"document too short": 1}
    assert summary["documents"] == len(records) + sum(summary["documents_dropped"].values())
    assert summary["excerpts"] == len(turns) + sum(summary["turns_dropped"].values())
    assert (summary["pairs"], summary["turns"]) == (len(records), len(turns))
    assert summary["documents_dropped"]["no excerpt"] == 1 and summary["turns_dropped"]["too few questions"] > 0
    assert summary["turns_dropped"]["too few questions, cut off"] > 0
    assert summary["text_dropped"]["excerpt too short"] >= 3
    for which in ("chosen", "rejected"):
        lengths = [getattr(turn, which).tokens for turn in turns]
        assert summary[f"{which}_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    cut_off = [not answer.finished for turn in turns for answer in (turn.chosen, turn.rejected)]
    assert summary["unfinished"] == pytest.approx(sum(cut_off) / len(cut_off))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith(
        f"pairs: {len(records)} pairs with {len(turns)} turns from 8 documents"
    )
    assert f"too few questions {summary['turns_dropped']['too few questions']}" in said[0]
    assert {len(record.turns) for record in records} == {1, 2}


def test_a_record_says_where_everything_comes_from(config, engine, tokenizer, tmp_path):
    records, _ = made(config, tmp_path)
    sources = {path.name: path.read_text() for path in Path(config.corpus.sources[0].partition("=")[2]).iterdir()}
    for record in records:
        assert record.document == sources[record.id.partition("/")[2].partition("#")[0]] == record.context
        assert (record.domain, record.cut) == ("book", None)
        assert record.tokens == len(tokenizer.encode_quoted(record.document))
        excerpts, _ = excerpts_of(record.document, tokenizer, config.excerpts, record.seed)
        known = [((excerpt.start, excerpt.end), (excerpt.first, excerpt.last)) for excerpt in excerpts]
        places = [known.index((turn.excerpt, turn.excerpt_tokens)) for turn in record.turns]
        assert places == sorted(set(places))
        assert all(turn.opener in OPENERS and turn.question.endswith("?") for turn in record.turns)
    assert len({record.seed for record in records}) == len(records)
    assert len({record.settings for record in records}) == 1


def test_chosen_is_asked_of_the_excerpt_and_rejected_of_the_whole_document(config, engine, tokenizer, tmp_path):
    records, _ = made(config, tmp_path)
    short = [prompt for kind, prompts in engine.calls if kind == "answers" for prompt in prompts]
    long = [prompt for kind, prompts in engine.calls if kind == "about" for prompt in prompts]
    for record in records:
        for turn in record.turns:
            excerpt, single = record.excerpt_of(turn), Dialogue(tokenizer, [turn.instruction])
            assert Dialogue(tokenizer, [request(config.instruct)]).shared(excerpt) in short
            assert single.shared(excerpt) in short
            assert single.shared(record.document) in long
    assert engine.drafts == [None] * len(engine.drafts)


def test_questions_are_read_from_words_that_were_made_to_begin_so(config, engine, tokenizer, tmp_path, monkeypatch):
    """What stands in the prompt counts as the model's: the answer alone would be one question."""
    asking, begun, plain = (
        replace(config.instruct, begins="1: ", at_least=2),
        tokenizer.encode_template("1: "),
        engine._say,
    )

    def say(prompts, *given):
        others = zip(prompts, plain(prompts, *given), strict=True)
        return [replace(said, text=QUESTIONS) if prompt[-len(begun) :] == begun else said for prompt, said in others]

    monkeypatch.setattr(engine, "_say", say)
    monkeypatch.setattr("longpo_jax.instruct.parsed", parsed)
    records, _ = made(replace(config, instruct=asking), tmp_path)
    asked = [prompt for kind, prompts in engine.calls if kind == "answers" for prompt in prompts]
    for record in records:
        for turn in record.turns:
            prompt = Dialogue(tokenizer, [request(asking)]).shared(record.excerpt_of(turn))
            assert prompt + begun in asked and prompt not in asked
    assert {turn.question for record in records for turn in record.turns} == {"Why of w1?", "What of w2?"}


def test_an_interrupted_run_goes_on_to_the_same_files(config, engine, tmp_path):
    """Whenever it is interrupted, and however often; with a last line that was torn, too."""
    run_pairs(config, tmp_path / "whole", quiet=True)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 4
    for stops in ([0], [1], [2], [3], [4], [5], [7], [1, 0, 1, 2, 1]):
        folder = tmp_path / str(stops)
        for after in stops:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                interrupt(patch, after)
                run_pairs(config, folder, quiet=True)
        begun = stops != [0]
        assert (folder / "pairs").exists() == begun
        for name in ("journal.jsonl", sorted(contents(folder))[-1]) if begun else ():
            with open(folder / "pairs" / name, "ab") as file:
                file.write(b'{"id": "bo')
        run_pairs(config, folder, quiet=True)
        assert contents(folder) == expected


def test_what_is_done_or_begun_with_other_settings_is_not_mixed(config, engine, tmp_path, monkeypatch):
    run_pairs(config, tmp_path / "done", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2)
        run_pairs(config, tmp_path / "begun", quiet=True)
    before = contents(tmp_path / "done"), contents(tmp_path / "begun")
    engine.calls.clear()
    run_pairs(replace(config, pairs=replace(config.pairs, batch=1)), tmp_path / "done", quiet=True)
    assert not engine.calls
    hot = replace(config, pairs=replace(config.pairs, temperature=0.5))
    for name in ("done", "begun"):
        with pytest.raises(InputError, match=r"pairs.temperature = 1.0, expected .*0.5"):
            run_pairs(hot, tmp_path / name, quiet=True)
    engine.weights = "others"
    for name in ("done", "begun"):
        with pytest.raises(InputError, match=r"model\.weights"):
            run_pairs(config, tmp_path / name, quiet=True)
    assert (contents(tmp_path / "done"), contents(tmp_path / "begun")) == before


def test_settings_and_seed_are_in_every_record(config, engine, tmp_path):
    base, _ = made(config, tmp_path / "base")
    other, _ = made(replace(config, seed=1), tmp_path / "other")
    assert base[0].settings != other[0].settings
    assert {record.seed for record in base}.isdisjoint(record.seed for record in other)
    engine.weights = "others"
    third, _ = made(config, tmp_path / "third")
    assert third[0].settings != base[0].settings
    assert {record.seed for record in third} & {record.seed for record in base}


def test_other_files_than_those_of_an_unfinished_run_are_refused(config, engine, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    for index in range(4):
        (tmp_path / "books" / f"{index}.txt").write_text(words(50, seed=index))
    config = replace(config, corpus=replace(config.corpus, sources=(f"book={tmp_path / 'books'}",)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        run_pairs(config, tmp_path, quiet=True)
    for path in (tmp_path / "books").iterdir():
        path.rename(path.with_stem(f"{path.stem}b"))
    with pytest.raises(InputError, match=r"document 1 of the corpus was book/\d.txt#0, is book/\db.txt#0"):
        run_pairs(config, tmp_path, quiet=True)


def test_a_document_that_is_too_long_loses_its_middle_and_no_question_a_word(config, engine, tokenizer, tmp_path):
    """The turns whose excerpt lay there are dropped: the model could not answer them from what is left."""
    around = len(Dialogue(tokenizer, [f"{max(OPENERS, key=len)} w00 w0?"]).shared(""))
    config = replace(
        config,
        pairs=replace(config.pairs, max_context=around + 12 + 112),
        excerpts=replace(config.excerpts, min_tokens=20, max_tokens=30, per_document=9),
    )
    records, summary = made(config, tmp_path)
    assert summary["turns_dropped"]["excerpt cut out"] > 0
    assert summary["excerpts"] == summary["turns"] + sum(summary["turns_dropped"].values())
    long = [prompt for kind, prompts in engine.calls if kind == "about" for prompt in prompts]
    assert max(map(len, long)) <= config.pairs.max_context - 12
    cut = [(record, *record.cut) for record in records if record.cut is not None]
    assert cut
    for record, start, end in cut:
        assert record.context == record.document[:start] + record.document[end:]
        assert 0 < start < len(record.document) / 2 < end < len(record.document)
        for turn in record.turns:
            assert turn.excerpt[1] <= start or turn.excerpt[0] >= end
            assert Dialogue(tokenizer, [turn.instruction]).shared(record.context) in long


def test_the_drafter_reads_the_excerpt_if_it_is_asked_to(config, engine, tokenizer, tmp_path):
    made(replace(config, pairs=replace(config.pairs, speculation="lossless")), tmp_path)
    short = [prompt for kind, prompts in engine.calls if kind == "answers" for prompt in prompts]
    long = [prompts for kind, prompts in engine.calls if kind == "about"]
    assert [len(drafts) for drafts in engine.drafts] == [len(prompts) for prompts in long]
    assert all(draft in short for drafts in engine.drafts for draft in drafts)


def test_pairs_that_the_filters_drop_leave_no_turn(config, engine, tmp_path):
    """The other turns of the document stay; if nothing at all is left, that is said, and the stage is not done."""
    engine.says = "always the same thing"
    for _ in range(2):
        with pytest.raises(InputError, match=r"expected pairs, got none: 0 pairs .*identical answers 1[0-9]") as error:
            run_pairs(config, tmp_path, quiet=True)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "pairs" / "done.json").exists()
    calls = len(engine.calls)
    with pytest.raises(InputError, match="expected pairs, got none"):
        run_pairs(config, tmp_path, quiet=True)
    assert len(engine.calls) == calls


def test_a_process_that_does_not_lead_writes_nothing(config, engine, tmp_path):
    run_pairs(config, tmp_path / "leads", quiet=True)
    calls = list(engine.calls)
    engine.calls.clear()
    run_pairs(config, tmp_path / "follows", leads=False, quiet=True)
    assert engine.calls == calls
    assert not (tmp_path / "follows").exists()


def test_the_middle_goes_and_as_much_stays_as_fits(tokenizer):
    text = "".join(random.Random(1).choices(["w1 ", "w22", "\u00e9", "\U0001f600", "the text\n\n", "<|im_end|>"], k=80))
    whole = len(tokenizer.encode_quoted(text))
    for room in range(1, whole, 7):
        start, end = middle_of(text, room, tokenizer) or (0, 0)
        size = len(tokenizer.encode_quoted(text[:start] + text[end:]))
        assert size <= room
        assert size > room - 12
        kept = [len(tokenizer.encode_quoted(part)) for part in (text[:start], text[end:])]
        assert abs(kept[0] - kept[1]) <= 12
    assert middle_of(text, whole, tokenizer) is None
    assert middle_of(text, 0, tokenizer) == (0, len(text))


def test_the_model_makes_the_same_files_however_it_is_interrupted(config, tmp_path, monkeypatch):
    """With the tiny model itself."""
    config = replace(config, corpus=replace(config.corpus, documents=3), pairs=replace(config.pairs, batch=2))
    _, summary = made(config, tmp_path / "whole")
    assert summary["documents"] == 3 and summary["turns"] >= 3
    for after in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, after)
            run_pairs(config, tmp_path / str(after), quiet=True)
        run_pairs(config, tmp_path / str(after), quiet=True)
        assert contents(tmp_path / str(after)) == contents(tmp_path / "whole")
