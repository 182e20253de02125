# SPDX-License-Identifier: Apache-2.0
"""The frozen reference: sums of log-probabilities against transformers, and a cache that knows what made it."""

import itertools
import json
import shutil
from dataclasses import replace
from datetime import datetime
from functools import cache

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_jax import reference, score_files
from longpo_jax.config import LongPOConfig
from longpo_jax.dialogue import Dialogue
from longpo_jax.journal import Writer
from longpo_jax.records import Answer, Record, Turn
from longpo_jax.reference import read_references, reference_inputs, run_reference
from longpo_jax.round import run_share
from longpo_jax.rows import batch_rows
from longpo_jax.samples import policy_parts
from longpo_jax.scorer import Scorer
from longpo_jax.scores import row_divergences
from longpo_jax.teacher import TEACHER, Teacher, batch_teachers, bytes_per_token
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model import chat
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.top_logprobs import TopLogProbs
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.share import shares_of
from rapid_jax.runtime.storage import working_place
from tests.tiny_models import CHATML, save_decoder, words

_COUNT = itertools.count()
OPSD = ("objective.name=opsd", "objective.top_k=5")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("model"))


def records(count: int = 3) -> list[Record]:
    found = []
    for index in range(count):
        document = words(60, seed=index)
        turns = tuple(
            Turn((at, at + 80), (0, 9), "So:", "what?", Answer("w1 w2 w3", 3, True), Answer("w2 w4", 2, index != 1))
            for at in (10, 120)
        )
        found.append(Record(f"d{index}", "a", document, 100, None, turns, index, "s"))
    return found


def config(model, *overrides: str) -> LongPOConfig:
    given = ["train.lengths=[512]", "train.tail=64", "train.logits_chunk=32", "train.attention_block=32"]
    return settings.defaults(LongPOConfig, [f"model.source={model}", "model.dtype=float32", *given, *overrides])


@cache
def scorer(model, *overrides: str) -> Scorer:
    return Scorer(config(model, *overrides), quiet=True)


def scores(model, made, *overrides: str):
    return scorer(model, *overrides).scores(made)


def plain(model, context: str, turns: list[Turn], kind: str, theta: float | None = None) -> float:
    """log p of the answers, by transformers in float64 on one whole sequence."""
    log_probs, targets = plain_log_softmax(model, context, turns, kind, theta)
    return float(log_probs.gather(1, targets[:, None]).sum())


def plain_log_softmax(model, context: str, turns: list[Turn], kind: str, theta: float | None = None):
    """(the whole distributions at the answers' tokens, those tokens)."""
    _, tokenizer = open_checkpoint(model)
    dialogue = Dialogue(tokenizer, [turn.instruction for turn in turns])
    branch = dialogue.branch([getattr(turn, kind) for turn in turns])
    shared = dialogue.shared(context)
    settings = LlamaConfig.from_pretrained(model)
    if theta is not None:
        settings.rope_parameters = {**settings.rope_parameters, "rope_theta": theta}
    ids = torch.tensor([shared + branch.tokens])
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model, config=settings).double()(ids).logits[0]
    places = torch.tensor([len(shared) + place for place, turn in enumerate(branch.turns) if turn > 0])
    return torch.log_softmax(logits, -1)[places - 1], ids[0, places]


@pytest.mark.parametrize("mesh", [(), ("mesh.fsdp=2", "mesh.context=4")])
def test_each_turn_is_scored_by_itself_behind_its_excerpt(model, mesh):
    made = records(2)
    for record, found in zip(made, scores(model, made, *mesh), strict=True):
        for kind in ("chosen", "rejected"):
            expected = [plain(model, record.excerpt_of(turn), [turn], kind) for turn in record.turns]
            np.testing.assert_allclose(found[kind], expected, atol=1e-4)


@pytest.mark.parametrize("mesh", [(), ("mesh.fsdp=2", "mesh.context=2", "mesh.model=2")])
def test_the_teacher_of_an_answer_from_the_document_reads_the_excerpt(model, mesh):
    """Each token's most probable tokens and the rest, of answers that ended and of one that was cut short."""
    made = records(2)
    for record, found in zip(made, scores(model, made, *OPSD, *mesh), strict=True):
        teacher = Teacher.from_json(Fields(found, "here"), 5)
        each = [plain_log_softmax(model, record.excerpt_of(turn), [turn], "rejected")[0] for turn in record.turns]
        assert teacher.tokens == tuple(map(len, each)) and sum(teacher.tokens) > 4
        expected, ids = torch.cat(each).sort(descending=True)
        np.testing.assert_array_equal(teacher.ids_TJ, ids[:, :5])
        np.testing.assert_allclose(teacher.log_probs_TJ, expected[:, :5], atol=2e-5)
        np.testing.assert_allclose(teacher.rest_T, expected[:, 5:].logsumexp(1), atol=2e-5)


def test_where_the_document_is_the_excerpt_the_teacher_teaches_nothing(model):
    (record,) = records(1)
    turn = replace(record.turns[0], excerpt=(0, len(record.document)))
    same = replace(record, turns=(turn,))
    taught = scorer(model, *OPSD)
    teacher = Teacher.from_json(Fields(taught.scores([same])[0], "here"), 5)
    tokenizer, decoder = taught._model.tokenizer, taught._model.decoder

    @jax.jit
    def of(batch):
        how = {"strategy": Strategy(block=32), "tail": 64, "logits_chunk": 32}
        return row_divergences(decoder, batch, TopLogProbs(*(batch[name] for name in TEACHER)), **how)

    found = []
    for read in (same, replace(same, document="w9 " + same.document)):
        row = policy_parts(tokenizer, read, "opsd", 0).packed(512, 64)
        batch = {**batch_rows([row], trunk=512, devices=1)} | {**batch_teachers([teacher], [row], devices=1)}
        found.append(float(of(batch)["kl_B"][0]))
    assert abs(found[0]) < 1e-5 < 1e-3 < found[1]


def test_an_answer_that_was_cut_short_has_no_end_token_to_score(model):
    turn = records(1)[0].turns[0]
    cut = replace(turn, rejected=replace(turn.rejected, finished=False))
    made = [replace(records(1)[0], turns=(one,)) for one in (turn, cut)]
    whole, short = (found["rejected"][0] for found in scores(model, made))
    assert short > whole + 0.1
    np.testing.assert_allclose(short, plain(model, made[1].excerpt_of(cut), [cut], "rejected"), atol=1e-4)


def test_the_baselines_read_the_document(model):
    made = records(1)
    (dpo,) = scores(model, made, "objective.name=dpo")
    for kind in ("chosen", "rejected"):
        np.testing.assert_allclose(dpo[kind], [plain(model, made[0].context, list(made[0].turns), kind)], atol=1e-4)
    (solopo,) = scores(model, made, "objective.name=solopo")
    expected = [plain(model, made[0].context, [turn], "chosen") for turn in made[0].turns]
    np.testing.assert_allclose(solopo["long_chosen"], expected, atol=1e-4)
    assert solopo["chosen"] == scores(model, made)[0]["chosen"]


def test_the_reference_has_a_rope_theta_of_its_own(model):
    made = records(1)
    (own,) = scores(model, made, "model.rope_theta=500.0")  # the policy's
    assert own == scores(model, made)[0]
    (other,) = scores(model, made, "model.reference_rope_theta=500.0")
    assert abs(other["chosen"][0] - own["chosen"][0]) > 1e-3
    turn = made[0].turns[0]
    np.testing.assert_allclose(
        other["chosen"][0], plain(model, made[0].excerpt_of(turn), [turn], "chosen", theta=500.0), atol=1e-4
    )


def test_only_the_excerpt_matters(model):
    (record,) = records(1)
    outside = replace(record, document=record.document[:300] + "w9 w9" + record.document[305:])
    inside = replace(record, document=record.document[:30] + "w9 w9" + record.document[35:])
    before, far, near = scores(model, [record])[0], scores(model, [outside])[0], scores(model, [inside])[0]
    assert far == before
    assert near["chosen"][0] != before["chosen"][0] and near["chosen"][1] == before["chosen"][1]


@pytest.fixture
def run(tmp_path):
    return written(tmp_path, records())


def written(folder, made):
    writer = Writer(folder / "pairs", {}, shard_pairs=2)
    for record in made:
        writer.add(record.id, record, {})
    writer.finish({})
    return folder


def kept(config, run):
    return read_references(run / "reference", reference_inputs(config, run))


def test_scores_are_kept_and_a_stale_cache_is_refused(model, run):
    with pytest.raises(InputError, match="run `longpo reference` first"):
        kept(config(model), run)
    run_reference(config(model), run, quiet=True)
    found = kept(config(model), run)
    assert list(found) == ["d0", "d1", "d2"]
    assert found["d1"] == {key: value for key, value in scores(model, records())[1].items() if key != "id"}
    with pytest.raises(InputError, match="reference_rope_theta"):
        kept(config(model, "model.reference_rope_theta=9.0"), run)
    with pytest.raises(InputError, match=r"objective\.name"):
        kept(config(model, "objective.name=dpo"), run)
    path = run / "reference" / "scores-00000.jsonl"
    path.write_text(path.read_text().replace("-", "", 1))
    with pytest.raises(InputError, match="expected the files that were written"):
        kept(config(model), run)


def test_teachers_are_kept_bit_for_bit_and_bound_to_what_made_them(model, run):
    run_reference(config(model, *OPSD), run, quiet=True)
    found = kept(config(model, *OPSD), run)
    assert list(found) == ["d0", "d1", "d2"]
    found.check(dict.fromkeys(found, 2))
    made = scores(model, records(), *OPSD)
    for record in made:
        assert found[record["id"]].to_json() == {key: value for key, value in record.items() if key != "id"}
    path = run / "reference" / "scores-00000.jsonl"
    tokens = sum(sum(record["tokens"]) for record in made)
    assert 0 < path.stat().st_size - tokens * bytes_per_token(5) < 250 * len(made)  # ids, checksums, ends in base 64
    with pytest.raises(InputError, match=r"objective\.top_k = 5, expected objective\.top_k = 6"):
        kept(config(model, "objective.name=opsd", "objective.top_k=6"), run)
    with pytest.raises(InputError, match=r"expected a teacher of 3 answers of 'd0', got 2"):
        found.check(dict.fromkeys(found, 3))
    row = policy_parts(open_checkpoint(model)[1], replace(records(1)[0], turns=records(1)[0].turns[:1]), "opsd", 0)
    with pytest.raises(InputError, match=r"expected a teacher of answers of \(5, 0\) tokens, got \(5, 5\)"):
        batch_teachers([found["d0"]], [row.packed(512, 64)], devices=1)
    data = bytearray(path.read_bytes())
    data[data.index(b'"ids": "') + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"scores-00000.jsonl:1: expected what was written there, got other bytes"):
        _ = found["d0"]
    for text, said in ((made[0]["ids"][:-8], "ids must be "), ("?", "ids must be ")):
        with pytest.raises(InputError, match=said):
            Teacher.from_json(Fields(made[0] | {"ids": text}, "here"), 5)


def test_more_tokens_than_the_vocabulary_has_are_refused(model):
    said = r"^objective.top_k: expected less than the model's vocabulary of \d+, got 1024$"
    with pytest.raises(InputError, match=said):
        scorer(model, "objective.name=opsd", "objective.top_k=1024")


def test_other_records_or_weights_make_it_stale(model, run, tmp_path_factory):
    run_reference(config(model), run, quiet=True)
    other = save_decoder(tmp_path_factory.mktemp("other"), seed=1)
    with pytest.raises(InputError, match=r"model\.weights"):
        kept(config(other), run)
    path = run / "pairs" / "pairs-00000.jsonl"
    path.write_text(path.read_text().replace("w1 w2 w3", "w1 w2 w2"))
    with pytest.raises(InputError, match="pairs"):
        kept(config(model), run)


def test_another_template_makes_it_stale_and_another_day_does_not(model, run, tmp_path, monkeypatch):
    def inputs(template: str) -> dict:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(model, folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        return reference_inputs(config(folder), run)

    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    today = inputs(dated)
    later = CHATML.replace("\n{{ message.content", "\n{% if loop.index > 1 %} {% endif %}{{ message.content")
    assert later != CHATML
    changed = [key for key, value in inputs(later).items() if value != inputs(CHATML)[key]]
    assert changed == ["model.template"]

    class Tomorrow:
        now = staticmethod(lambda: datetime(2001, 1, 1))

    monkeypatch.setattr(chat, "datetime", Tomorrow)
    assert inputs(dated) == today


def test_a_log_probability_that_is_not_finite_is_refused(model, run, monkeypatch):
    monkeypatch.setattr(Scorer, "sums", lambda self, parts: [(-1.0, float("nan"))] * len(parts))
    with pytest.raises(InputError, match="of the rejected answer of document d0, got nan"):
        run_reference(config(model), run, quiet=True)
    assert not list((run / "reference").glob("scores-*"))


def test_a_damaged_record_and_a_mesh_that_does_not_fit_are_told_before_anything_is_written(model, run, monkeypatch):
    for mesh, said in (("mesh.data=9", "expected 9 devices, got 8"), ("mesh.model=8", "of size 4 cannot be split")):
        with pytest.raises(InputError, match=said):
            run_reference(config(model, mesh, "train.rows_per_step=9"), run, quiet=True)
    monkeypatch.setattr(Scorer, "__init__", None)  # no model is loaded
    last = run / "pairs" / "pairs-00001.jsonl"
    last.write_bytes(last.read_bytes()[:-9])
    for objective in ("longpo", "sft"):
        with pytest.raises(InputError, match=r"pairs-00001.jsonl:1: expected a whole line, got one that is cut off"):
            run_reference(config(model, f"objective.name={objective}"), run, quiet=True)
    assert not (run / "reference").exists()


def test_a_process_that_does_not_lead_writes_nothing(model, run):
    run_reference(config(model), run, leads=False, quiet=True)
    assert not (run / "reference").exists()


@pytest.fixture(params=["disk", "gs", "s3"])
def anywhere(request, tmp_path):
    """The folder of a run with its pairs on a disk, and in a bucket of each kind."""
    if request.param == "disk":
        return written(tmp_path, records())
    request.getfixturevalue({"gs": "bucket", "s3": "s3_bucket"}[request.param])
    return written(working_place(f"{request.param}://models/reference {next(_COUNT)}", "run"), records())


def test_an_interrupted_run_goes_on(anywhere, model, tmp_path, monkeypatch):
    """To the scores of one that nothing interrupted."""
    run = anywhere
    for module in (reference, score_files):
        monkeypatch.setattr(module, "TOGETHER", 1)
    calls, plain_scores = [], Scorer.scores

    def scores(self, made):
        calls.append([record.id for record in made])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain_scores(self, made)

    monkeypatch.setattr(Scorer, "scores", scores)
    with pytest.raises(KeyboardInterrupt):
        run_reference(config(model), run, quiet=True)
    run_reference(config(model), run, quiet=True)
    assert calls == [["d0"], ["d1"], ["d2"], ["d2"]]
    monkeypatch.undo()
    again = written(tmp_path / "again", records())
    run_reference(config(model), again, quiet=True)
    assert kept(config(model), run) == kept(config(model), again)


def test_nothing_is_scored_for_sft(model, run):
    run_reference(config(model, "objective.name=sft"), run, quiet=True)
    assert kept(config(model, "objective.name=sft"), run) == {}


@pytest.fixture
def shared(model, tmp_path, monkeypatch):
    """(a function that makes shares in a folder of its own, what one host makes); records are scored one at a time."""
    for module in (reference, score_files):
        monkeypatch.setattr(module, "TOGETHER", 1)
    monkeypatch.setattr("longpo_jax.share_loop._LOOK_S", 0.02)

    def share(folder, text: str, *overrides: str) -> None:
        run_share("reference", config(model, *overrides), folder, shares_of(text), quiet=True)

    one = written(tmp_path / "one", records())
    run_reference(config(model), one, quiet=True)
    return share, files_of(one)


def files_of(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "reference").iterdir()}


@pytest.mark.parametrize("given", [["1/2", "0/2"], ["2/5", "any/5"]])
def test_shares_of_several_hosts_are_joined_to_the_bytes_of_one(given, shared, anywhere):
    """Fewer and more shares than files of scores."""
    (share, expected), run = shared, anywhere
    for text in given:
        assert not (run / "reference").exists()
        share(run, text)
    assert files_of(run) == expected and not (run / "reference-shares").exists()


def test_a_share_that_was_killed_is_taken_over_and_another_work_there_is_refused(shared, run, model, monkeypatch):
    share, expected = shared
    calls, plain_scores = [], Scorer.scores

    def scores(self, made):
        calls.append([record.id for record in made])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain_scores(self, made)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "scores", scores)
        with pytest.raises(KeyboardInterrupt):
            share(run, "1/2")
        with pytest.raises(
            InputError, match="expected 2 shares that are done, got 0: `longpo reference --share any/2`"
        ):
            run_reference(config(model), run, quiet=True)
        with pytest.raises(InputError, match="was made with shares = 2, expected shares = 3"):
            share(run, "0/3")
        with pytest.raises(InputError, match=r"was made with model.reference_rope_theta = null"):
            share(run, "0/2", "model.reference_rope_theta=9.0")
        share(run, "any/2")
    assert sorted(calls) == [["d0"], ["d1"], ["d2"], ["d2"]] and files_of(run) == expected
    with pytest.raises(InputError, match="expected nothing there that one run has begun"):
        (run / "reference" / "done.json").unlink()
        share(run, "0/2")


def test_where_nothing_is_to_be_scored_a_share_is_the_whole_stage(shared, run, model):
    share, _ = shared
    share(run, "any/2", "objective.name=sft")
    assert kept(config(model, "objective.name=sft"), run) == {} and not (run / "reference-shares").exists()
