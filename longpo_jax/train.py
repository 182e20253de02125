# SPDX-License-Identifier: Apache-2.0
"""The stage that trains: rows in the data's order, an update for every `rows_per_step`, checkpoints, and restarts.

A run that is killed and started again makes the same updates on the same rows, bit for bit on the same devices. SIGTERM
(preemption) and SIGINT let the update finish, save, and end with status 75 (start it again) and 130.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import nnx

from longpo_jax.checkpoint_files import Found, newest
from longpo_jax.checkpoints import Checkpoints, named, restore
from longpo_jax.config import LongPOConfig
from longpo_jax.emergency import EmergencyCopies
from longpo_jax.metrics import Metrics, check_installed, peak_flops, read_metrics
from longpo_jax.optimizer import schedule_of, transform_of
from longpo_jax.pace import Clock
from longpo_jax.reference import OfRecords, read_references, reference_inputs
from longpo_jax.shortfall import lost, warning
from longpo_jax.signals import Signals
from longpo_jax.soundness import finite_each
from longpo_jax.stages import check_place, has_ended, inputs_of, is_to_skip, mark_done, stage_in, summary_of
from longpo_jax.step import TOLD, Sample, Step, TrainState
from rapid_jax.model.identity import identity_of
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint
from rapid_jax.runtime.agreement import all_told
from rapid_jax.runtime.axes import TRAINED
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.runtime.value_sums import array_sums


def run_train(config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """Trains on `folder`/pairs with `folder`/reference; goes on from the newest checkpoint in `folder`/train.

    All processes train together and see the same folder. Raises InputError for what cannot be used, and for a loss or
    gradient that is not finite, before any weight is touched; SystemExit with 75 or 130 when told to end.
    """
    place = folder / "train"
    if not has_ended(place):
        check_installed(config.train)
        check_place(folder)
    reference = reference_inputs(config, folder)
    inputs = inputs_of(config, "train") | identity_of(config.model.source, config.model.dtype)
    inputs |= {"pairs": reference["pairs"], "reference": digest(repr(sorted(reference.items())))}
    if is_to_skip(place, inputs, leads=leads):
        return
    references = read_references(stage_in(folder, "reference"), reference)
    found = _begun(place, inputs)
    reader = _reader(config, stage_in(folder, "pairs"), references)
    made = summary_of(stage_in(folder, "pairs")), sum(reader.rows.too_long.values())
    if reader.total < config.train.rows_per_step:
        raise InputError(f"{_too_few(config, reader.total)}. {lost(*made)}")
    if leads and (few := warning(config, reader.total, *made)) is not None:
        say(f"longpo: {few}")
    model = policy_of(config, quiet=quiet)
    with Signals() as signals:
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
        raise InputError(_too_few(config, rows))
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def _too_few(config: LongPOConfig, rows: int) -> str:
    return f"train.rows_per_step: expected at most the {rows} rows there are, got {config.train.rows_per_step}"


def _reader(config: LongPOConfig, pairs: AnyPlace, references: OfRecords) -> Any:
    """The rows, in the data's order. Raises InputError where seqio or TensorFlow cannot be imported."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2") == "2":  # as the command sets it
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow, imported by tasks, reports that it finds no GPU
    try:
        from longpo_jax.tasks import Reader
    except ImportError as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"training reads its rows through seqio and TensorFlow, which cannot be imported: {said}"
        ) from error
    return Reader(config, pairs, references, open_checkpoint(config.model.source)[1])


def _begun(place: AnyPlace, inputs: dict[str, Any]) -> Found | None:
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


class _Loop:
    """Training on its devices."""

    def __init__(
        self, config: LongPOConfig, place: AnyPlace, model: LoadedModel, inputs: dict[str, Any], signals: Signals
    ):
        self._config, self._place, self._inputs, self._signals = config, place, inputs, signals
        self._model, self._copies = model, EmergencyCopies(config.train, place, inputs)
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
        state, note = self._resume(state, found)
        self._begin(state, note)
        first = int(state.step)
        reader.start_at(0 if note is None else note.whole("position"), self.held)
        given = {"steps": steps, "resumed": first, "leads": leads, "quiet": quiet}
        metrics = Metrics(self._place, tensorboard=train.tensorboard, wandb=train.wandb, **given)
        folder = self._place / "checkpoints"
        with Checkpoints(folder, start=first, keep=train.keep, keep_every=train.keep_every) as checkpoints:
            try:
                state = self._updates(step, state, iter(reader), (first, steps), metrics, checkpoints)
            except BaseException:
                with contextlib.suppress(InputError):  # what ended the updates says more
                    metrics.close()
                raise
            metrics.close()
        self._copies.close()
        if _sum(state) == self._started:
            raise InputError(
                f"{self._place}: expected training to change a weight, got none changed by {steps} updates: "
                "optimizer.learning_rate, objective"
            )
        made = {"steps": steps, "rows": steps * train.rows_per_step, "too_long": dict(reader.rows.too_long)}
        return made | {"last": read_metrics(self._place)[-1] if leads else {}}

    def _resume(self, state: TrainState, found: Found | None) -> tuple[TrainState, Fields | None]:
        """(the state to go on from, the note beside it): of the newest checkpoint, or of copies that are newer."""
        after = 0 if found is None else found.step
        if (copied := self._copies.restore(state, after=after)) is not None:
            return copied
        return (state, None) if found is None else (restore(found, state), found.note)

    def _begin(self, state: TrainState, note: Fields | None) -> None:
        """Notes what the run starts from. Raises InputError if a weight of the model is NaN or infinite."""
        if note is not None:
            self._started = note.whole("started")
            return
        finite = jax.tree.leaves_with_path(jax.device_get(finite_each(nnx.state(state.weights, nnx.Param))))
        wrong = [jax.tree_util.keystr(path, simple=True, separator=".") for path, sound in finite if not sound]
        if wrong:
            raise InputError(
                f"{self._config.model.source}: expected finite weights to train, got NaN or infinite ones in {wrong[0]}"
                + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            )
        self._started = _sum(state)

    def _updates(
        self,
        step: Step,
        state: TrainState,
        samples: Iterator[Sample | None],
        span: tuple[int, int],
        metrics: Metrics,
        checkpoints: Checkpoints,
    ) -> TrainState:
        """The state after the updates from the first of `span` on, up to the second; tells and saves on the way."""
        train, (first, steps) = self._config.train, span
        clock = Clock(steps, sum(peak_flops(device.device_kind) or 0.0 for device in self._devices))
        rate = schedule_of(self._config.optimizer, steps)
        saved = first
        for index in range(first, steps):
            state, found, ids = self._update(step, state, samples, clock)
            if not found["finite"]:
                if index > saved:
                    checkpoints.save(state, self._note(index))
                checkpoints.wait()
                raise InputError(self._not_finite(found, index, ids))
            if not found["weights_finite"]:
                checkpoints.wait()
                raise InputError(self._overflow_message(found, index, saved, float(np.asarray(rate(index)))))
            line = {"step": index + 1, "rows": (index + 1) * train.rows_per_step}
            line |= {"learning_rate": float(np.asarray(rate(index)))}
            line |= {name: value for name, value in found.items() if name not in TOLD} | clock.read(index + 1)
            ending = self._signals.agreed()
            last = index + 1 == steps
            if last or (index + 1) % train.log_every == 0:
                metrics.add(line)
            if last or ending is not None or (index + 1) % train.save_every == 0:
                checkpoints.save(state, self._note(index + 1))
                metrics.keep()
                if saved > first:  # it is whole: the new one is begun after it
                    self._copies.drop(saved)
                saved = index + 1
                clock.skip()
            elif self._copies.are_due(index + 1):
                self._copies.save(state, self._note(index + 1))
                clock.skip()
            if ending is not None and not last:
                checkpoints.wait()
                say(f"longpo: told to end: saved after update {index + 1} of {steps}")
                raise SystemExit(ending)
        return state

    def _note(self, step: int) -> dict[str, Any]:
        """Beside the arrays: the rows that were read, and the inputs; what is drawn follows from the seed in them."""
        position = step * self._config.train.rows_per_step
        return {"inputs": self._inputs, "position": position, "started": self._started}

    def _update(
        self, step: Step, state: TrainState, samples: Iterator[Sample | None], clock: Clock
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
        wrong = "loss" if not math.isfinite(found["loss"]) else "gradient"
        held = f"are in {self._place / 'checkpoints' / str(index)}" if index else "are the model's own"
        return (
            f"update {index + 1}: expected a finite {wrong}, got the loss {found['loss']} and a gradient of norm "
            f"{found['grad_norm']} from the documents {', '.join(_of_all(ids))}; no weight was touched, they {held}"
        )

    def _overflow_message(self, found: dict[str, float], index: int, saved: int, rate: float) -> str:
        held = f"in {self._place / 'checkpoints' / str(saved)}" if saved else "the model's own"
        return (
            f"update {index + 1}: expected finite weights, got NaN or infinite ones at a learning rate of {rate:g} "
            f"(gradient norm {found['grad_norm']:g}): they were not saved, the last good ones are {held}"
        )


def _sum(state: TrainState) -> int:
    return sum(map(int, array_sums(named(nnx.state(state.weights, nnx.Param))).values()))


def _of_all(ids: list[str]) -> list[str]:
    """The ids that any process has, each once."""
    return list(dict.fromkeys(name for theirs in all_told(ids) for name in theirs))
