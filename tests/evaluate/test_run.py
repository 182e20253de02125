# SPDX-License-Identifier: Apache-2.0
"""Every sample is answered once in every mode, whatever stops the run; scores are those of known answers."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rapid_jax.config import ModelsConfig, RapidConfig
from rapid_jax.evaluate.folder import begin, check_folder, open_answers
from rapid_jax.evaluate.modes import modes_of
from rapid_jax.evaluate.report import report
from rapid_jax.evaluate.results import read
from rapid_jax.evaluate.run import NOW, decides, evaluate, measure_of
from rapid_jax.evaluate.samples import Sample
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace
from tests.evaluate.stub import Stub

CONFIG = RapidConfig(models=ModelsConfig(target="smollm2"))
MODES = modes_of("target,rapid:eta=5", CONFIG)


def sample(number: int, *, task: str = "copy", length: int = 64, **more) -> Sample:
    fields = {"answers": (f"key{number}",), "metric": "ruler_all", "max_new_tokens": 20, "length": length} | more
    question = f"question {number}"
    return Sample(f"{task}/{length}/{number}", "qa", task, f"document with key{number}", question, **fields)


SAMPLES = [sample(number, length=length) for length in (64, 128) for number in range(5)]


def say(mode: str, document: str, question: str) -> str:
    """The target finds every key, rapid those of even numbers, and says nothing else."""
    del question
    number = int(document[-1])
    return f"It is key{number}." if mode == "target" or number % 2 == 0 else ""


def begun(folder: Any, *, resume: bool = False, samples=SAMPLES) -> Any:
    check_folder(folder, resume=resume)
    described = {"suite": "qa", "options": {"seed": 0}, "samples": len(samples), "settings": decides(CONFIG)}
    begin(folder, described, CONFIG)
    return folder


def run(folder: AnyPlace, *, share: Share | None = None, batch: int = 3) -> None:
    """Begins the evaluation there, or goes on with it."""
    begun(folder, resume=True)
    evaluate(Stub(CONFIG, say), SAMPLES, MODES, folder, share=share, batch=batch, quiet=True)  # type: ignore[arg-type]


def lines_in(folder: Path) -> dict[str, list[dict]]:
    """Without the times."""
    files = {path.name: path.read_text().splitlines() for path in sorted(folder.glob("answers-*"))}
    return {name: [json.loads(line) | {"seconds": None} for line in lines] for name, lines in files.items()}


def test_a_model_of_known_answers_has_known_scores(tmp_path):
    stub = Stub(CONFIG, say)
    evaluate(stub, SAMPLES, MODES, begun(tmp_path), batch=3, quiet=True)  # type: ignore[arg-type]
    found = read(tmp_path)
    assert {label: [o.score for o in outcomes] for label, outcomes in found.by_label.items()} == {
        "target": [1.0] * 10,
        "rapid-eta=5": [1.0, 0.0, 1.0, 0.0, 1.0] * 2,
    }
    first = found.by_label["rapid-eta=5"][0]
    assert (first.id, first.settings, first.answer) == ("copy/64/0", {"eta": 5.0}, "It is key0.")
    # Groups of one task and length, at most three, a mode after the other; the limit of tokens is the samples'.
    asked = [(mode, limit, len(questions)) for mode, limit, questions in stub.groups]
    assert asked == [(mode, 20, size) for size in (3, 2, 3, 2) for mode in ("target", "rapid")]
    report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "100.0" in text and "60.0" in text


@pytest.mark.parametrize("stops", [[0], [1], [3], [1, 0, 2, 1]])
def test_a_run_that_is_stopped_goes_on_and_repeats_nothing(stops, tmp_path):
    evaluate(Stub(CONFIG, say), SAMPLES, MODES, begun(tmp_path / "whole"), batch=2, quiet=True)  # type: ignore[arg-type]
    folder = tmp_path / "stopped"
    for number, after in enumerate(stops):
        stub = Stub(CONFIG, say)
        answers, left = Stub.answers, [after]

        def stopping(self, *given, answers=answers, left=left, **how):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return answers(self, *given, **how)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Stub, "answers", stopping)
            evaluate(stub, SAMPLES, MODES, begun(folder, resume=number > 0), batch=2, quiet=True)  # type: ignore[arg-type]
        for path in folder.glob("answers-*"):  # killed while it wrote
            with open(path, "ab") as file:
                file.write(b'{"id": "copy/64/')
    evaluate(Stub(CONFIG, say), SAMPLES, MODES, begun(folder, resume=True), batch=2, quiet=True)  # type: ignore[arg-type]
    assert lines_in(folder) == lines_in(tmp_path / "whole")


def test_shares_are_the_whole(tmp_path):
    for index in range(3):
        folder = begun(tmp_path / "shared", resume=True)
        evaluate(Stub(CONFIG, say), SAMPLES, MODES, folder, share=Share(index, 3), quiet=True)  # type: ignore[arg-type]
    evaluate(Stub(CONFIG, say), SAMPLES, MODES, begun(tmp_path / "whole"), quiet=True)  # type: ignore[arg-type]
    shared, whole = read(tmp_path / "shared"), read(tmp_path / "whole")
    assert len(list((tmp_path / "shared").glob("answers-target.*"))) == 3
    for label, outcomes in whole.by_label.items():
        assert sorted(o.id for o in shared.by_label[label]) == sorted(o.id for o in outcomes)
    before = lines_in(tmp_path / "shared")
    stub = Stub(CONFIG, say)
    evaluate(stub, SAMPLES, MODES, tmp_path / "shared", quiet=True)  # type: ignore[arg-type]
    assert stub.loaded == []
    after = lines_in(tmp_path / "shared")  # of all shares nothing is left to do
    assert {name: lines for name, lines in after.items() if lines} == before


def test_two_runs_do_not_write_to_one_file(tmp_path):
    folder = begun(tmp_path)
    said = r"answers-target.jsonl: expected no other run there, got one that is at work"
    with open_answers(folder, ["target"], Share(), leads=True), pytest.raises(InputError, match=said):
        evaluate(Stub(CONFIG, say), SAMPLES, MODES, folder, quiet=True)  # type: ignore[arg-type]
    evaluate(Stub(CONFIG, say), SAMPLES, MODES, folder, quiet=True)  # type: ignore[arg-type]


def test_who_does_not_lead_writes_nothing(tmp_path):
    evaluate(Stub(CONFIG, say), SAMPLES, MODES, begun(tmp_path), leads=False, quiet=True)  # type: ignore[arg-type]
    assert lines_in(tmp_path) == {}


def test_unrelated_retrieval_is_from_the_next_sample_s_document(tmp_path):
    modes = modes_of("rapid,rapid:unrelated", CONFIG)
    evaluate(Stub(CONFIG, say), SAMPLES[:5], modes, begun(tmp_path), quiet=True)  # type: ignore[arg-type]
    lines = lines_in(tmp_path)
    drafts = {name: [line["draft_ends"][0] for line in each] for name, each in lines.items()}
    assert drafts["answers-rapid.jsonl"] == [f"document with key{n}question {n}" for n in range(5)]
    assert drafts["answers-rapid-unrelated.jsonl"] == [f"document with key{(n + 1) % 5}question {n}" for n in range(5)]
    assert [line["prompt_ends"][1] for line in lines["answers-rapid-unrelated.jsonl"]] == [
        f"document with key{n}question {n}" for n in range(5)
    ]


def test_samples_without_a_length_go_by_their_size(tmp_path):
    asked = [
        replace(sample(number, length=0), length=None, document="x" * size + "1") for number, size in ((0, 9), (1, 3))
    ]
    stub = Stub(CONFIG, say)
    evaluate(stub, asked, MODES[:1], begun(tmp_path), quiet=True)  # type: ignore[arg-type]
    assert [questions for *_, questions in stub.groups] == [["question 1"], ["question 0"]]


def test_thoughts_are_followed_by_the_question_for_the_answer(tmp_path):
    """In mode target, on the first answer alone; the second answer is scored, and both are kept."""
    asked = [sample(number, then="You said: {answer} So?", then_tokens=7) for number in range(2)]
    stub = Stub(
        CONFIG, lambda mode, document, question: "key1" if "You said" in question else f"thought {document[-1]}"
    )
    evaluate(stub, asked, MODES[1:], begun(tmp_path), batch=2, quiet=True)  # type: ignore[arg-type]
    (lines,) = lines_in(tmp_path).values()
    assert [line["score"] for line in lines] == [0.0, 1.0]
    assert (lines[0]["thoughts"], lines[0]["answer"]) == ("thought 0", "key1")
    assert lines[0]["new_tokens"] == len("thought 0" + "key1") and lines[0]["finish_reason"] == "stop"
    assert [(mode, limit) for mode, limit, _ in stub.groups] == [("rapid", 20), ("target", 7)]


def test_a_limit_of_a_mode_stands_before_the_samples(tmp_path):
    modes = modes_of("target,target:max_new_tokens=5", CONFIG)
    asked = [sample(number, then="You said: {answer} So?", then_tokens=7) for number in range(2)]
    stub = Stub(CONFIG, lambda *_: "key")
    evaluate(stub, asked, modes, begun(tmp_path), quiet=True)  # type: ignore[arg-type]
    assert sorted({(mode, limit) for mode, limit, _ in stub.groups}) == [("target", limit) for limit in (5, 7, 20)]


def test_a_bar_changes_nothing(tmp_path):
    for name, quiet in (("quiet", True), ("told", False)):
        evaluate(Stub(CONFIG, say), SAMPLES, MODES, begun(tmp_path / name), batch=3, quiet=quiet)  # type: ignore[arg-type]
    assert lines_in(tmp_path / "quiet") == lines_in(tmp_path / "told")


def test_a_folder_with_a_damaged_line_is_not_gone_on_with(tmp_path):
    evaluate(Stub(CONFIG, say), SAMPLES[:2], MODES[:1], begun(tmp_path), quiet=True)  # type: ignore[arg-type]
    path = tmp_path / "answers-target.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', '"score": 2.0', 1))
    with pytest.raises(InputError, match=r"answers-target.jsonl:1: score must be a number from 0 to 1, got 2.0"):
        begun(tmp_path, resume=True)


def test_another_run_is_not_gone_on_with(tmp_path):
    begun(tmp_path)
    with pytest.raises(InputError, match="expected a folder without an evaluation, got one: --resume"):
        begun(tmp_path)
    begun(tmp_path, resume=True)
    with pytest.raises(InputError, match="was begun with samples = 10, expected 9: choose another --out"):
        begun(tmp_path, resume=True, samples=SAMPLES[1:])


def test_keys_and_values_that_are_rounded_are_another_run():
    rounded = replace(CONFIG, compute=replace(CONFIG.compute, kv="int8"))
    assert decides(rounded) == decides(CONFIG) | {"kv": "int8"}
    assert decides(replace(CONFIG, compute=replace(CONFIG.compute, prefill_chunk=64))) == decides(CONFIG)


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    folder, calls = begun(tmp_path), []

    def full(number):
        calls.append(number)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"answers-target.jsonl: cannot be written: No space left on device"):
        evaluate(Stub(CONFIG, say), SAMPLES, MODES, folder, quiet=True)  # type: ignore[arg-type]
    assert {name: len(lines) for name, lines in lines_in(folder).items()} == {
        "answers-target.jsonl": 1,
        "answers-rapid-eta=5.jsonl": 1,
    }
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: expected a folder or nothing there, got a file"):
        check_folder(tmp_path / "file", resume=False)


def test_modes_are_the_settings_with_changes():
    found = modes_of("lossless,rapid:eta=20:min_tokens=2048,phat,retrieval:retrieval.chunk_tokens=64", CONFIG)
    assert [mode.label for mode in found] == [
        "lossless",
        "rapid-eta=20-min_tokens=2048",
        "phat",
        "retrieval-retrieval.chunk_tokens=64",
    ]
    assert [mode.config.speculation.mode for mode in found] == ["lossless", "rapid", "phat", "retrieval"]
    assert found[1].changes == {"eta": 20.0, "retrieval.min_tokens": 2048}
    assert found[1].config.retrieval.min_tokens == 2048 and found[1].config.speculation.eta == 20.0
    assert replace(found[2].config, speculation=CONFIG.speculation) == CONFIG
    plain = modes_of("target,retrieval,rapid,target:lookup=on", CONFIG)
    assert [mode.config.speculation.lookup for mode in plain] == ["off", "off", "auto", "on"]
    assert [mode.changes for mode in plain] == [{"lookup": "off"}] * 2 + [{}, {"lookup": "on"}]
    asked = modes_of("target,rapid", CONFIG, ["speculation.lookup"])
    assert [mode.config.speculation.lookup for mode in asked] == ["auto", "auto"] and asked[0].changes == {}
    kept = "target:models.too_long=middle:models.max_context=512:stop=[x]:prompts.system=brief:max_new_tokens=5"
    (other,) = modes_of(kept, CONFIG)
    assert other.config.models == ModelsConfig(target="smollm2", too_long="middle", max_context=512)
    assert (other.config.stop, other.config.prompts.system, other.limit) == (("x",), "brief", 5)
    (long,) = modes_of(f"rapid:prompts.system={'word ' * 100}", CONFIG)
    assert len(long.label) < 120 and long.label.startswith("rapid-")


def test_a_mode_by_its_former_name(caplog):
    found = modes_of("sd:gamma=5", CONFIG)
    assert [(mode.label, mode.config.speculation.mode) for mode in found] == [("lossless-gamma=5", "lossless")]
    assert "--modes: sd is called lossless now; the next release does not know sd" in caplog.text
    with pytest.raises(InputError, match="expected each mode once, got 'sd' again"):
        modes_of("lossless,sd", CONFIG)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("fast", "expected modes of .*, got 'fast'"),
        ("rapid:eta", "--modes: expected KEY=VALUE or unrelated behind a colon, got 'eta' in 'rapid:eta'"),
        ("rapid:models.drafter=x", "expected a setting that a mode may change .*, got 'models.drafter'"),
        ("rapid:models.dtype=float32", "expected a setting that a mode may change .*, got 'models.dtype'"),
        ("rapid:batch_size=2", "expected a setting that a mode may change .*, got 'batch_size'"),
        ("rapid:compute.kv=int8", "expected a setting that a mode may change .*, got 'compute.kv'"),
        ("rapid:cache.disk_gib=1", "expected a setting that a mode may change .*, got 'cache.disk_gib'"),
        ("target:models.too_long=tail", "models.too_long: expected one of 'error', 'middle', 'head', got 'tail'"),
        ("rapid:retrieval=1", "unknown setting 'retrieval'"),
        ("rapid:mesh.model=2", "expected a setting that a mode may change .*, got 'mesh.model'"),
        ("rapid:mode=target", "expected a setting that a mode may change .*, got 'mode'"),
        ("rapid:max_new_tokens=0", "max_new_tokens must be >= 1, got 0"),
        ("rapid:speed=1", "unknown setting 'speed'"),
        ("target,target", "expected each mode once"),
        ("", "expected modes of"),
    ],
)
def test_modes_that_are_none(asked, said):
    with pytest.raises(InputError, match=said):
        modes_of(asked, CONFIG)


def test_a_sample_has_the_same_prompt_on_any_day(tmp_path):
    """A template that writes the date: the date of evaluations while samples are made and answered, else today's."""
    from tests.tiny_models import (
        tokenizer_files,  # takes seconds to import, and a process of test_bucket.py imports this
    )

    template = b"{{ strftime_now('%d %b %Y') }} {% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = Tokenizer({**tokenizer_files(["the text 0123456789"]), "chat_template.jinja": template})
    messages = [{"role": "user", "content": "the text"}]
    today = tokenizer.chat(messages)
    assert today != "01 Jan 2025 the text"
    assert measure_of(CONFIG, tokenizer)(sample(0)) > 0
    assert tokenizer.chat(messages) == "01 Jan 2025 the text"
    stub = Stub(CONFIG, say)
    evaluate(stub, SAMPLES[:1], MODES[:1], begun(tmp_path, samples=SAMPLES[:1]), quiet=True)  # type: ignore[arg-type]
    assert stub.target.tokenizer.now == NOW
