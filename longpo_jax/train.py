# SPDX-License-Identifier: Apache-2.0
"""The stage that trains: rows in the data's order, an update for every `rows_per_step`, checkpoints, and restarts.

A run that is killed and started again makes the same updates on the same rows, bit for bit on the same devices. SIGTERM
(preemption) and SIGINT let the update finish, save, and end with status 75 (start it again) and 130.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from longpo_jax.checkpoints import Checkpoints, Found, newest, restore
from longpo_jax.config import LongPOConfig
from longpo_jax.metrics import Metrics, check_installed, peak_flops, read_metrics
from longpo_jax.optimizer import schedule_of, transform_of
from longpo_jax.reference import read_references, reference_inputs
from longpo_jax.stages import inputs_of, is_to_skip, mark_done
from longpo_jax.step import Sample, Step, TrainState
from rapid_jax.model.identity import identity_of
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint
from rapid_jax.runtime.axes import TRAINED
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.distributed import INTERRUPTED, LOST_PEER
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.mesh import make_meshes


def run_train(config: LongPOConfig, folder: Path, *, leads: bool = True, quiet: bool = False) -> None:
    """Trains on `folder`/pairs with `folder`/reference; goes on from the newest checkpoint in `folder`/train.

    All processes train together and see the same folder. Raises InputError for what cannot be used, and for a loss or
    gradient that is not finite, before any weight is touched; SystemExit with 75 or 130 when told to end.
    """
    place = folder / "train"
    check_installed(config.train)
    reference = reference_inputs(config, folder)
    inputs = inputs_of(config, "train") | identity_of(config.model.source, config.model.dtype)
    inputs |= {"pairs": reference["pairs"], "reference": digest(repr(sorted(reference.items())))}
    if is_to_skip(place, inputs, leads=leads):
        return
    references = read_references(folder / "reference", reference)
    found = _begun(place, inputs)
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2") == "2":  # as the command sets it
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow, imported by tasks, reports that it finds no GPU
    from longpo_jax.tasks import Reader

    reader = Reader(config, folder / "pairs", references, open_checkpoint(config.model.source)[1])
    steps_of(config, reader.total)  # too few rows are told before the model is loaded
    model = policy_of(config, quiet=quiet)
    with _Signals() as signals:
        summary = _Loop(config, place, model, inputs, signals).run(reader, found, leads=leads, quiet=quiet)
        if leads:
            mark_done(place, inputs, summary)
        if (ending := signals.agreed()) is not None:  # no further stage
            say("longpo: told to end: training is done")
            raise SystemExit(ending)


def policy_of(config: LongPOConfig, *, quiet: bool = False) -> LoadedModel:
    """The model that is trained, on the mesh of training, in float32."""
    return load_model(
        config.model.source,
        layout="stacked",
        dtype="float32",
        mesh=make_meshes(config.mesh, None)[0],
        table=TRAINED,
        replicate_kv=config.mesh.replicate_kv,
        rope_theta=config.model.rope_theta,
        quiet=quiet,
    )


def steps_of(config: LongPOConfig, rows: int) -> int:
    """Updates of a run over `rows` rows in all. Raises InputError if there are too few for one."""
    steps = rows // config.train.rows_per_step
    if steps == 0:
        raise InputError(
            f"train.rows_per_step: expected at most the {rows} rows there are, got {config.train.rows_per_step}"
        )
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def _begun(place: Path, inputs: dict[str, Any]) -> Found | None:
    """The newest checkpoint. Raises InputError if it is one of other inputs."""
    found = newest(place / "checkpoints")
    if found is None:
        return None
    got, expected = found.note["inputs"], json.loads(json.dumps(inputs))
    for key in (*expected, *got):
        if expected.get(key) != got.get(key):
            raise InputError(
                f"{place} was begun with {key} = {json.dumps(got.get(key)):.60}, expected "
                f"{json.dumps(expected.get(key)):.60}: choose another run folder, or delete {place}"
            )
    return found


class _Signals:
    """Notes SIGTERM and SIGINT while it is entered. All processes of a run agree on what was noted."""

    def __init__(self):
        self._noted: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self._noted == number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._noted = number

    def agreed(self) -> int | None:
        """The exit status that one of the processes was asked for; None to go on."""
        noted = self._noted or 0
        if jax.process_count() > 1:
            noted = int(np.max(multihost_utils.process_allgather(np.int32(noted))))
        return {0: None, signal.SIGINT: INTERRUPTED}.get(noted, LOST_PEER)


class _Loop:
    """Training on its devices."""

    def __init__(
        self, config: LongPOConfig, place: Path, model: LoadedModel, inputs: dict[str, Any], signals: _Signals
    ):
        self._config, self._place, self._inputs, self._signals = config, place, inputs, signals
        self._model = model
        self._microbatch = config.mesh.data * config.mesh.fsdp
        self._devices = jax.devices()[:1] if model.decoder.mesh is None else list(model.decoder.mesh.devices.flat)

    @property
    def held(self) -> list[int]:
        """The rows of an update that a device of this process holds a part of."""
        rows, per = self._config.train.rows_per_step, self._microbatch
        mesh = self._model.decoder.mesh
        mine = range(per)
        if mesh is not None and jax.process_count() > 1:
            sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
            parts = sharding.addressable_devices_indices_map((per,)).values()
            mine = sorted({row for (part,) in filter(None, parts) for row in range(per)[part]})
        return [start + row for start in range(0, rows, per) for row in mine]

    def run(self, reader: Any, found: Found | None, *, leads: bool, quiet: bool) -> dict[str, Any]:
        """Updates from the checkpoint `found` on until the last; what came of them."""
        config, train = self._config, self._config.train
        steps = steps_of(config, reader.total)
        if reader.rows.too_long and leads:
            longer = sum(reader.rows.too_long.values())
            say(f"train: {longer} of {longer + len(reader)} rows are longer than train.lengths or train.tail: left out")
        step = Step(config, self._model.decoder, transform_of(config.optimizer, steps))
        state = step.start(self._model.decoder)
        state = state if found is None else restore(found, state)
        first = int(state.step)
        reader.start_at(0 if found is None else found.note["position"], self.held)
        metrics = Metrics(
            self._place,
            steps=steps,
            resumed=first,
            tensorboard=train.tensorboard,
            wandb=train.wandb,
            leads=leads,
            quiet=quiet,
        )
        folder = self._place / "checkpoints"
        with Checkpoints(folder, start=first, keep=train.keep, keep_every=train.keep_every) as checkpoints:
            try:
                self._updates(step, state, iter(reader), (first, steps), metrics, checkpoints)
            finally:
                metrics.close()
        made = {"steps": steps, "rows": steps * train.rows_per_step, "too_long": dict(reader.rows.too_long)}
        return made | {"last": read_metrics(self._place)[-1] if leads else {}}

    def _updates(
        self,
        step: Step,
        state: TrainState,
        samples: Iterator[Sample | None],
        span: tuple[int, int],
        metrics: Metrics,
        checkpoints: Checkpoints,
    ) -> None:
        """The updates from the first of `span` on, up to the second, with what is told and saved of them."""
        train, (first, steps) = self._config.train, span
        clock = _Clock(steps, sum(peak_flops(device.device_kind) or 0.0 for device in self._devices))
        rate = schedule_of(self._config.optimizer, steps)
        saved = first
        for index in range(first, steps):
            state, found, ids = self._update(step, state, samples, clock)
            if not found["finite"]:
                if index > saved:
                    checkpoints.save(state, self._note(index))
                checkpoints.wait()
                raise InputError(self._not_finite(found, index, ids))
            line = {
                "step": index + 1,
                "rows": (index + 1) * train.rows_per_step,
                "learning_rate": float(np.asarray(rate(index))),
            }
            line |= {name: value for name, value in found.items() if name != "finite"} | clock.read(index + 1)
            ending = self._signals.agreed()
            last = index + 1 == steps
            if last or (index + 1) % train.log_every == 0:
                metrics.add(line)
            if last or ending is not None or (index + 1) % train.save_every == 0:
                checkpoints.save(state, self._note(index + 1))
                saved = index + 1
                clock.skip()
            if ending is not None and not last:
                checkpoints.wait()
                say(f"longpo: told to end: saved after update {index + 1} of {steps}")
                raise SystemExit(ending)

    def _note(self, step: int) -> dict[str, Any]:
        """Beside the arrays: the rows that were read, and the inputs; what is drawn follows from the seed in them."""
        return {"inputs": self._inputs, "position": step * self._config.train.rows_per_step}

    def _update(
        self, step: Step, state: TrainState, samples: Iterator[Sample | None], clock: "_Clock"
    ) -> tuple[TrainState, dict[str, float], list[str]]:
        """(state, metrics, ids of the rows that are here) after one update."""
        total, ids = None, []
        for _ in range(0, self._config.train.rows_per_step, self._microbatch):
            rows = list(islice(samples, self._microbatch))
            ids += [sample.id for sample in rows if sample is not None]
            batch = step.place(rows)
            clock.add(step.tokens(batch), step.flops(batch))
            total = step.accumulate(state, total, batch)
        state, found = step.update(state, total)
        return state, {name: float(value) for name, value in jax.device_get(found).items()}, ids

    def _not_finite(self, found: dict[str, float], index: int, ids: list[str]) -> str:
        held = f"are in {self._place / 'checkpoints' / str(index)}" if index else "are the model's own"
        return (
            f"update {index + 1}: expected a finite loss and gradient, got {found['loss']} and norm "
            f"{found['grad_norm']} from the documents {', '.join(_of_all(ids))}; no weight was touched, they {held}"
        )


def _of_all(ids: list[str]) -> list[str]:
    """The ids that any process has, each once."""
    if jax.process_count() > 1:
        mine = np.frombuffer(json.dumps(ids).encode(), np.uint8)
        longest = int(np.max(multihost_utils.process_allgather(np.int32(mine.size))))
        padded = np.pad(mine, (0, longest - mine.size), constant_values=ord(" "))
        every = multihost_utils.process_allgather(padded)
        ids = [name for theirs in every for name in json.loads(theirs.tobytes())]
    return list(dict.fromkeys(ids))


class _Clock:
    """Tokens and operations since the last look, and the time they took."""

    def __init__(self, steps: int, peak: float):
        self._steps, self._peak = steps, peak
        self._counts: list[tuple[jax.Array, jax.Array]] = []
        self._start = self._last = time.perf_counter()
        self._begun: int | None = None  # updates made when the first, which compiles, was over

    def add(self, tokens: jax.Array, flops: jax.Array) -> None:
        """Of one microbatch; what is still being computed is not waited for."""
        self._counts.append((tokens, flops))

    def skip(self) -> None:
        """What was done since the last look was not an update."""
        self._last = time.perf_counter()

    def read(self, step: int) -> dict[str, float | None]:
        """tokens, seconds, tokens_per_second, mfu, seconds_left after update `step`.

        The first update compiles: it has a time and no rate.
        """
        now = time.perf_counter()
        seconds = now - self._last
        tokens, flops = (sum(map(float, counts)) for counts in zip(*self._counts, strict=True))
        self._last, self._counts = now, []
        found: dict[str, float | None] = {"tokens": tokens, "seconds": seconds}
        if self._begun is None:
            self._begun, self._start = step, now
            return found | {"tokens_per_second": None, "mfu": None, "seconds_left": None}
        left = (now - self._start) / (step - self._begun) * (self._steps - step)
        mfu = flops / seconds / self._peak if self._peak else None
        return found | {"tokens_per_second": tokens / seconds, "mfu": mfu, "seconds_left": left}
