# SPDX-License-Identifier: Apache-2.0
"""What is told of training: JSON lines always, a bar or plain lines, TensorBoard and wandb where asked for.

A line of metrics.jsonl is about one update:

    step, rows                         updates and rows (documents) so far
    tokens, seconds                    of this update; the document and first instruction of a row count once
    tokens_per_second, mfu             null for the first update after a start, which compiles; mfu: the share of the
                                       devices' dense bfloat16 peak, null where that is not known
    seconds_left                       as the updates since the start went
    learning_rate                      that this update used
    loss, nll, preference, rewards/*   means over its rows (loss.py), before the update
    kl, teacher_rest                   of opsd: nats a token; the share of the teacher's mass that its top_k leave
    grad_norm                          before clipping
"""

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from longpo_jax.config import TrainConfig
from rapid_jax.plan.topologies import GENERATIONS
from rapid_jax.runtime.append_log import Log, has_log, log_at
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import LocalFolder, digest
from rapid_jax.runtime.json_input import parse_object
from rapid_jax.runtime.storage import AnyPlace, full_name

FILE = "metrics.jsonl"
ROWS = ("seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "clu")  # what tasks.py imports, and seqio
# Dense bfloat16 FLOP/s from NVIDIA's data sheets, the first that a device's name contains. TPUs: plan/topologies.py.
_GPU_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
_TPU_KINDS = {
    **{"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this kind (`jax.Device.device_kind`); None if it is not known."""
    for name, peak in _GPU_PEAKS.items():
        if name in device_kind:
            return peak
    generation = GENERATIONS.get(_TPU_KINDS.get(device_kind, ""))
    return None if generation is None else generation.flops


def check_installed(train: TrainConfig) -> None:
    """Raises InputError if a package that training needs, or the settings ask for, is not there; none is imported."""
    missing = [name for name in ROWS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"training reads its rows through seqio and TensorFlow, expected {', '.join(missing)}, not installed here: "
            "pip install '.[longpo]' in a checkout (pairs, reference, export and report need none of them)"
        )
    for name, package, asked in (
        ("tensorboard", "tensorboardX", train.tensorboard),
        ("wandb", "wandb", train.wandb is not None),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(
                f"train.{name}: expected the package {package}, it is not installed: pip install {package}"
            )


class Metrics:
    """One run's metrics; of several processes one tells them.

    `resumed` is the number of updates that the run starts from: later lines of an earlier start are cut away, so that
    the file is that of a run without a break.
    """

    def __init__(
        self,
        folder: AnyPlace,
        *,
        steps: int,
        resumed: int,
        tensorboard: bool,
        wandb: str | None,
        leads: bool,
        quiet: bool,
    ):
        self._leads, self._steps, self._quiet = leads, steps, quiet
        self._bar = self._tensorboard = self._wandb = None
        if not leads:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._log = log_at(folder / FILE, durable=False)
        _cut(self._log, resumed)
        self._events = LocalFolder(folder / "tensorboard")
        if tensorboard:
            from tensorboardX import SummaryWriter

            place = str(self._events.path)
            self._tensorboard = SummaryWriter(place, purge_step=resumed + 1, filename_suffix=f".{resumed}")
        if wandb is not None:
            self._wandb = importlib.import_module("wandb")
            # The same run again after a restart.
            name = digest(full_name(folder))[:16]
            self._notes = LocalFolder(folder)  # wandb's own, which it sends itself
            here = str(self._notes.path)
            self._wandb.init(project=wandb, id=name, name=folder.parent.name, dir=here, resume="allow")
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=resumed, desc="train", unit=" steps", dynamic_ncols=True)

    def add(self, line: Mapping[str, Any]) -> None:
        """An update's metrics; `line` has "step", counted from 1, and "seconds_left"."""
        if not self._leads:
            return
        self._log.append(f"{json.dumps(line)}\n".encode())
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])
        told = _told(line)
        if self._bar is not None:
            self._bar.n = line["step"]
            self._bar.set_postfix_str(told)
        elif not self._quiet:
            left = line["seconds_left"]
            say(f"train: {line['step']}/{self._steps} {told}" + (f", {left:.0f} s left" if left is not None else ""))

    def keep(self) -> None:
        """Where the folder is in a bucket, TensorBoard's events go there now."""
        if self._tensorboard is not None:
            self._tensorboard.flush()
            self._events.push()

    def close(self) -> None:
        """After the last update."""
        for writer in (self._bar, self._tensorboard):
            if writer is not None:
                writer.close()
        if self._leads:
            self._events.push()
            self._log.join()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: AnyPlace) -> list[dict[str, Any]]:
    """The lines of a run's training, in order. Raises InputError if there are none, or one is damaged."""
    path = folder / FILE
    if not has_log(path):
        raise InputError(f"{path}: expected the metrics of a training run, got no file")
    found = []
    for number, line in enumerate(log_at(path).read().splitlines(), start=1):
        values = _metrics_of(line)
        if values is None or (found and values["step"] <= found[-1]["step"]):
            raise InputError(f"{path}:{number}: expected a line of metrics, got {line[:40].decode(errors='replace')!r}")
        found.append(values)
    if not found:
        raise InputError(f"{path}: expected the metrics of a training run, got an empty file")
    return found


def _metrics_of(line: bytes) -> dict[str, Any] | None:
    """An update's numbers and nulls, its step no null; None if the line is something else."""
    try:
        values = parse_object(line, FILE)
        return {name: values.number(name, None) for name in values} | {"step": values.whole("step", least=1)}
    except InputError:
        return None


def _cut(log: Log, resumed: int) -> None:
    """Takes away the lines of updates after `resumed`, and a last line that is not whole."""
    end = 0
    for line in log.read().splitlines(keepends=True):
        if not line.endswith(b"\n") or _step(line) > resumed:
            break
        end += len(line)
    log.truncate(end)


def _step(line: bytes) -> float:
    """Of a line that is no metrics, one that is past every update."""
    values = _metrics_of(line)
    return math.inf if values is None else values["step"]


def _told(line: Mapping[str, Any]) -> str:
    names = (("loss", "loss"), ("nll", "nll"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"))
    words = [f"{short} {line[name]:.4g}" for name, short in names if name in line]
    if line["tokens_per_second"] is not None:
        words.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if line["mfu"] is not None:
        words.append(f"MFU {line['mfu']:.1%}")
    return ", ".join(words)
