# SPDX-License-Identifier: Apache-2.0
"""The report of one run or several: what is drawn, where it is written, and that it needs nothing else."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from longpo_jax import report as module
from longpo_jax.report import report
from rapid_jax.runtime.errors import InputError


def trained(run: Path, steps: int = 40, **more) -> Path:
    """A run's folder with plausible metrics."""
    (run / "train").mkdir(parents=True)
    with open(run / "train" / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            chosen, rejected = 0.02 * step, -0.01 * step
            line = {"step": step, "loss": 2.0 / step, "nll": 1.9 / step, "preference": 0.7, "grad_norm": 1.0}
            line |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
            line |= {"rewards/accuracies": 0.5, "learning_rate": 1e-6}
            line |= {"tokens_per_second": None if step == 1 else 4401.0, "mfu": None}
            file.write(json.dumps(line | more) + "\n")
    return run


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list]:
    """What each panel shows: title -> lines as (label, x, y)."""
    found: dict[str, list] = {}
    close = pyplot.close

    def look(figure):
        for panel in figure.axes:
            if panel.axison:
                lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
                found[panel.get_title()] = lines
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    return found


def test_every_metric_has_its_curve(tmp_path, drawn, capsys):
    run = trained(tmp_path / "run")
    report([run])
    titles = ["loss", "NLL", "preference loss", "rewards", "margins", "accuracies", "gradient norm", "learning rate"]
    assert list(drawn) == [*titles, "tokens/s"]
    raw, smooth = drawn["loss"]
    assert raw[1] == list(range(1, 41)) and raw[2] == [2.0 / step for step in range(1, 41)]
    assert smooth[0] == str(run) and smooth[2][10] == pytest.approx(sum(2.0 / step for step in (10, 11, 12)) / 3)
    assert [label for label, *_ in drawn["rewards"]][1::2] == [f"{run} chosen", f"{run} rejected"]
    assert drawn["tokens/s"][0][1] == list(range(2, 41))  # the first update has no rate
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (run / "report.svg").read_bytes()
    with open(run / "report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"], row["loss"]) for row in rows[:2]] == [(str(run), "1", "2"), (str(run), "2", "1")]
    assert len(rows) == 40 and rows[0]["tokens_per_second"] == "" and rows[-1]["rewards/chosen"] == "0.8"
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_the_page_needs_nothing_else_and_says_the_numbers(tmp_path):
    run = trained(tmp_path / "a<b>", mfu=0.4)
    report([run])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|<script|@import", page)
    assert "a&lt;b&gt;" in page and "<b>" not in page
    assert "<td>40</td><td>2 to 0.05</td>" in page and "<td>0.4 to 0.4</td>" in page
    assert 'src="data:image/svg+xml;base64,' in page


def test_several_runs_and_all_rounds_are_in_one_picture(tmp_path, drawn):
    for number in (1, 2, 10):
        trained(tmp_path / "rounds" / f"round-{number}")
    sft = trained(tmp_path / "sft")
    text = (sft / "train" / "metrics.jsonl").read_text()
    lines = [{k: v for k, v in json.loads(line).items() if "rewards" not in k} for line in text.splitlines()]
    (sft / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report([tmp_path / "rounds", sft / "train"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"report.{kind}" for kind in ("csv", "html", "png", "svg")
    ]
    names = [str(tmp_path / "rounds" / f"round-{number}") for number in (1, 2, 10)]
    assert [label for label, *_ in drawn["loss"]][1::2] == [*names, str(sft / "train")]
    assert [label for label, *_ in drawn["margins"]][1::2] == names
    drawn.clear()
    report([sft], tmp_path / "out")
    assert "loss" in drawn and "margins" not in drawn


def test_missing_and_empty_metrics_are_one_line_and_nothing_is_written(tmp_path):
    good = trained(tmp_path / "good")
    (tmp_path / "none").mkdir()
    empty = trained(tmp_path / "empty", steps=0)
    for run, said in [
        ("none", r"none: expected the metrics of a training run, got no metrics.jsonl"),
        (empty, "empty file"),
    ]:
        with pytest.raises(InputError, match=said):
            report([good, tmp_path / run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_metrics_and_a_file_in_the_way_are_one_line_and_nothing_is_written(tmp_path):
    good, bad = trained(tmp_path / "good"), tmp_path / "bad"
    (tmp_path / "file").write_text("mine")
    (bad / "train").mkdir(parents=True)
    for content in (
        b"\xff\xfe\x00",
        b"[1]",
        b'{"step": "a"}',
        b'{"step": 1, "loss": "b"}',
        b'{"step": 1',
        b'{"loss": 1}',
    ):
        (bad / "train" / "metrics.jsonl").write_bytes(content + b"\n")
        with pytest.raises(InputError, match=r"metrics.jsonl:1: expected a line of metrics, got '"):
            report([good, bad], tmp_path / "out")
    (bad / "train" / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    with pytest.raises(InputError, match=r"bad: expected metrics such as loss, got none"):
        report([bad], tmp_path / "out")
    with pytest.raises(InputError, match=r"file: expected a folder to write to, got a file"):
        report([good], tmp_path / "file")
    bad.rename(tmp_path / "round-x")
    with pytest.raises(InputError, match="expected the metrics of a training run"):
        report([tmp_path])
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_run_of_one_update_is_drawn(tmp_path, monkeypatch):
    """Every panel shows its point: ink of the run's colour within the axes."""
    inked = {}
    close = pyplot.close

    def look(figure):
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
        for panel in (panel for panel in figure.axes if panel.axison):
            box = panel.get_window_extent().extents.round().astype(int)
            inside = pixels[pixels.shape[0] - box[3] : pixels.shape[0] - box[1], box[0] : box[2]]
            legend = panel.get_legend().get_window_extent().extents.round().astype(int) - box[[0, 1, 0, 1]]
            inside[inside.shape[0] - legend[3] : inside.shape[0] - legend[1], legend[0] : legend[2]] = 255
            inked[panel.get_title()] = int((np.abs(inside - [31, 119, 180]).sum(-1) < 30).sum())
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    report([trained(tmp_path / "run", steps=1)])
    assert len(inked) == 8 and "tokens/s" not in inked  # of which the first update has none
    assert min(inked.values()) > 20, inked
    inked.clear()
    report([trained(tmp_path / "two", steps=2)])
    assert len(inked) == 9 and min(inked.values()) > 20, inked


@pytest.mark.parametrize("count", [1, 3, 41, 200])
def test_smoothing_keeps_constants_and_lengths(count):
    assert module._smooth([2.5] * count) == [2.5] * count
    ramp = [float(value) for value in range(count)]
    middle = count // 2
    assert module._smooth(ramp)[middle] == pytest.approx(ramp[middle])
