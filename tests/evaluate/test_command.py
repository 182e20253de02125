# SPDX-License-Identifier: Apache-2.0
"""`rapid evaluate`, `report` and `compare` as they are called, on a tiny model."""

import json
from pathlib import Path

import pytest

from rapid_jax.cli import main
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """The options of a tiny model and of three questions."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = [
        {"id": f"q{number}", "document": words(90, seed=number), "question": "w1 w2?", "answers": ["w3"]}
        for number in range(3)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {
        "models.target": save_decoder(folder / "model"),
        "models.encoder": encoders.save(folder / "encoder", "bert"),
        "retrieval.chunk_tokens": 64,
        "retrieval.min_tokens": 128,
        "compute.prefill_chunk": 128,
        "cache.folder": folder / "cache",
        "cache.programs": "false",
        "speculation.gamma": 3,
    }
    settings = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return ["--suite", "qa", "--data", str(folder / "questions.jsonl"), *settings]


def test_an_evaluation_its_report_and_a_comparison(tiny, tmp_path, capfd):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    modes = ["--modes", "target,rapid:eta=5", "--batch", "3", "--quiet"]
    assert main(["evaluate", *tiny, *modes, "--out", one]) == 0
    captured = capfd.readouterr()
    head = "qa, scores in %\n===============\n\nSamples finished of 3: target (3), rapid-eta=5 (3)."
    assert captured.out.startswith(head) and captured.err == ""
    scores = [line.split() for line in captured.out.splitlines() if line.startswith(("task", "documents"))]
    assert scores[0] == ["task", "target", "rapid-eta=5"] and scores[1][0] == "documents" and len(scores) == 2
    assert captured.out.endswith(f"\n\nreport: {one}/report.md, report.html\n")
    suite = json.loads((Path(one) / "suite.json").read_text())
    assert suite["max_new_tokens"] == {"documents": [64, 64]}
    assert "max_new_tokens" not in suite["settings"]["sampling"]
    assert sorted(path.name for path in Path(one).iterdir() if path.suffix not in (".png", ".svg", ".csv")) == [
        "answers-rapid-eta=5.jsonl",
        "answers-target.jsonl",
        "report.html",
        "report.md",
        "settings.yaml",
        "suite.json",
    ]
    lines = [json.loads(line) for line in (Path(one) / "answers-rapid-eta=5.jsonl").read_text().splitlines()]
    assert sorted(line["id"].rpartition("/")[2] for line in lines) == ["q0", "q1", "q2"]
    for line in lines:
        assert line["chunks"] and line["draft_tokens"] > 0 and line["acceptance"] is not None
        assert line["prompt_tokens"] > line["document_tokens"] > 0 and not line["truncated"]
        assert set(line["seconds"]) == {"retrieval", "prefill", "compile", "decode"}
    assert main(["evaluate", *tiny, *modes, "--out", one]) == 2
    assert "got one: --resume goes on with it" in capfd.readouterr().err
    before = (Path(one) / "answers-target.jsonl").read_bytes()
    assert main(["evaluate", *tiny, *modes, "--out", one, "--resume"]) == 0
    assert (Path(one) / "answers-target.jsonl").read_bytes() == before
    shares = [
        main(["evaluate", *tiny, "--modes", "target", "--quiet", "--out", other, "--share", f"{i}/2"]) for i in (0, 1)
    ]
    assert shares == [0, 0] and not (Path(other) / "report.md").exists()
    assert main(["report", other]) == 0 and (Path(other) / "report.md").exists()
    capfd.readouterr()
    assert main(["compare", one, other]) == 0
    assert "too few questions" in capfd.readouterr().out


def test_settings_that_an_evaluation_has_defaults_for_are_honoured(tiny, tmp_path, capfd):
    out = tmp_path / "out"
    limits = ["--set", "sampling.max_new_tokens=4", "--set", "speculation.lookup=on", "--set", "sampling.seed=7"]
    limits += ["--set", "cache.prefixes=true"]
    modes = ["--modes", "target,target:max_new_tokens=2:models.too_long=middle:models.max_context=150"]
    assert main(["evaluate", *tiny, *limits, *modes, "--out", str(out)]) == 0
    err = capfd.readouterr().err
    assert "answers have at most 4 tokens, by sampling.max_new_tokens" in err
    suite = json.loads((out / "suite.json").read_text())
    assert suite["max_new_tokens"] == {"documents": [4, 4]} and suite["settings"]["sampling"]["max_new_tokens"] == 4
    assert suite["settings"]["sampling"]["seed"] == 7 and suite["settings"]["speculation"]["lookup"] == "on"
    assert "prefixes: true\n" in (out / "settings.yaml").read_text()
    lines = {path.stem: [json.loads(x) for x in path.read_text().splitlines()] for path in out.glob("answers-*")}
    whole, cut = (lines[name] for name in sorted(lines))
    assert [line["new_tokens"] for line in whole] == [4] * 3 and [line["new_tokens"] for line in cut] == [2] * 3
    assert not any(line["truncated"] for line in whole) and all(line["truncated"] for line in cut)
    assert all(line["prompt_tokens"] <= 148 for line in cut) and "lookup" not in whole[0]["settings"]


@pytest.mark.parametrize(
    ("words_of", "said"),
    [
        (["--modes", "slow"], "--modes: expected modes of"),
        (["--share", "2/2"], "--share: expected I/N with 0 <= I < N, got '2/2'"),
        (["--lengths", "256"], "has whole documents: lengths and depths are of no use"),
        (["--lengths", "999999"], "--lengths: expected at most the 2048 tokens"),
        (["--text", "x"], "--text: --suite qa has no use for it"),
        (
            ["--set", "models.max_context=200"],
            "documents/q0 in mode rapid: expected at most 200 tokens with the answer, got",
        ),
        (
            [
                "--set",
                "models.too_long=middle",
                "--modes",
                "target,target:models.too_long=error:models.max_context=200",
            ],
            "documents/q0 in mode target-models.too_long=error-models.max_context=200: expected at most 200 tokens",
        ),
        (
            ["--modes", "target:models.too_long=middle:models.max_context=70"],
            "expected at most 70 tokens around the document, the answer among them, got",
        ),
        (["--modes", "target:models.max_context=4096"], "models.max_context: expected at most the 2048 positions that"),
        (["--modes", "target:models.layout=stacked"], "expected a setting that a mode may change"),
        (
            ["--modes", "target:max_new_tokens=2000"],
            "documents/q0 in mode target-max_new_tokens=2000: expected at most",
        ),
        (
            ["--set", "prompts.target='{document} {question}'"],
            "prompts.target: expected it not to be set, since qa asks",
        ),
        (["--modes", "rapid:prompts.drafter='{document} {question}'"], "prompts.drafter: expected it not to be set"),
        (["--modes", "target", "--set", "speculation.mode=rapid"], "speculation.mode: --modes says which modes"),
        (["--set", "models.max_context=4096"], "models.max_context: expected at most the 2048 positions that"),
        (["--lengths", "4k"], "--lengths: expected a whole number of at least 1, got '4k'"),
        (["--depths", "2"], "--depths: expected depths from 0 to 1, got 2"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--tasks", "riddles"], "riddles"),
        (["--set", "models.target=nowhere"], "nowhere: expected a checkpoint folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tiny, tmp_path, capfd, words_of, said):
    out = tmp_path / "out"
    assert main(["evaluate", *tiny, *words_of, "--out", str(out)]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and said in captured.err and captured.out == ""
    assert not out.exists()


def test_a_folder_without_an_evaluation(tmp_path, capfd):
    for command in (["report", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        assert main(command) == 2
        assert capfd.readouterr().err.count("\n") == 1
