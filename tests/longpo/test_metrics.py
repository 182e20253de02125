# SPDX-License-Identifier: Apache-2.0
"""The file of metrics is that of a run without a break; what else is asked for gets the same numbers."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

from longpo_jax import metrics as module
from longpo_jax.config import TrainConfig
from longpo_jax.metrics import FILE, Metrics, check_installed, peak_flops, read_metrics
from rapid_jax.runtime.errors import InputError


def line(step: int, **more) -> dict:
    rates = {"tokens_per_second": 4401.2, "mfu": None, "seconds_left": 90.0}
    return {"step": step, "loss": 2.0 / step, "nll": 1.5, "rewards/margins": -0.02 * step, **rates, **more}


def opened(folder: Path, resumed: int = 0, **more) -> Metrics:
    options = {"tensorboard": False, "wandb": None, "leads": True, "quiet": True} | more
    return Metrics(folder, steps=9, resumed=resumed, **options)


def written(folder: Path, *steps: int, resumed: int = 0, **more) -> None:
    metrics = opened(folder, resumed, **more)
    for step in steps:
        metrics.add(line(step))
    metrics.close()


def test_lines_are_read_back(tmp_path):
    written(tmp_path, 1, 2, 3)
    assert read_metrics(tmp_path) == [line(step) for step in (1, 2, 3)]


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "lo', b"\0\0\0\n", b'{"loss": 1}\n', b"[5]\n"])
def test_what_is_past_the_checkpoint_is_cut_away(tmp_path, torn):
    written(tmp_path, 1, 2, 3, 4)
    with open(tmp_path / FILE, "ab") as file:
        file.write(torn)
    written(tmp_path, 3, 4, 5, resumed=2)
    assert read_metrics(tmp_path) == [line(step) for step in (1, 2, 3, 4, 5)]
    written(tmp_path, 1, resumed=0)
    assert read_metrics(tmp_path) == [line(1)]


def test_a_torn_line_of_the_past_is_not_read(tmp_path):
    written(tmp_path, 1)
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'{"step": 2')
    written(tmp_path, 3, resumed=2)
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 3]


def test_who_does_not_lead_writes_nothing(tmp_path):
    written(tmp_path, 1, leads=False, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected the metrics of a training run, got no file"),
        ("", "expected the metrics of a training run, got an empty file"),
        ('{"step": 1}\nbroken\n', ":2: expected a line of metrics, got 'broken'"),
        ('{"loss": 1}\n', ":1: expected a line of metrics"),
        ("[1]\n", ":1: expected a line of metrics"),
    ],
)
def test_a_file_that_is_no_metrics_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=said):
        read_metrics(tmp_path)


def test_a_log_gets_plain_lines(tmp_path, capsys):
    metrics = opened(tmp_path, quiet=False)
    metrics.add(line(1, tokens_per_second=None, seconds_left=None))
    metrics.add(line(2, mfu=0.413))
    metrics.close()
    assert capsys.readouterr().err.splitlines() == [
        "train: 1/9 loss 2, nll 1.5, margin -0.02",
        "train: 2/9 loss 1, nll 1.5, margin -0.04, 4401 tokens/s, MFU 41.3%, 90 s left",
    ]


def test_a_terminal_gets_a_bar_that_starts_where_the_run_does(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "tqdm", lambda **how: tqdm(file=terminal, mininterval=0, **how))
    metrics = opened(tmp_path, resumed=4, quiet=False)
    metrics.add(line(5))
    metrics.close()
    said = terminal.getvalue().split("\r")
    assert any("| 4/9" in text for text in said)
    assert any("| 5/9" in text and "loss 0.4, nll 1.5, margin -0.1, 4401 tokens/s" in text for text in said)


tqdm = module.tqdm


def events_in(folder: Path) -> list[tuple]:
    """(step, name, value) of all files in order; ("start", step) where TensorBoard forgets all from there on."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a TFRecord: 8 bytes of length, 4 of checksum, the event, 4 of checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status == SessionLog.START:
                found.append(("start", event.step))
    return found


def test_tensorboard_gets_every_number_and_forgets_what_is_done_again(tmp_path):
    written(tmp_path, 1, 2, 3, tensorboard=True)
    written(tmp_path, 3, 4, resumed=2, tensorboard=True)
    events = events_in(tmp_path / "tensorboard")
    wanted = [event for event in events if event[0] == "start" or event[1] == "loss"]
    third = (3, "loss", pytest.approx(2 / 3))
    steps = [(1, "loss", 2.0), (2, "loss", 1.0), third, ("start", 3), third, (4, "loss", 0.5)]
    assert wanted[wanted[0] == ("start", 1) :] == steps
    names = {event[1] for event in events}
    assert "rewards/margins" in names and not names & {"mfu", "step"}


def test_wandb_gets_one_run_however_often_it_starts(tmp_path, monkeypatch):
    said = []
    fake = SimpleNamespace(
        init=lambda **how: said.append(how),
        log=lambda numbers, step: said.append((step, numbers)),
        finish=lambda: said.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (0, 1):
        written(tmp_path / "run" / "train", resumed + 1, resumed=resumed, wandb="project")
    first, logged, finish, second, *_ = said
    assert first == second and (first["project"], first["name"], first["resume"]) == ("project", "run", "allow")
    numbers = {key: value for key, value in line(1).items() if key not in ("step", "mfu")}
    assert logged == (1, numbers) and finish == "finish"


def test_a_package_that_is_not_there_is_named():
    check_installed(TrainConfig(tensorboard=True))
    with pytest.raises(InputError, match=r"^train.wandb: expected the package wandb, it is not installed"):
        check_installed(TrainConfig(wandb="project"))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153e12),
        ("TPU v3", None),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_the_file_holds_plain_json(tmp_path):
    written(tmp_path, 1)
    (text,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(text)["mfu"] is None and "NaN" not in text
