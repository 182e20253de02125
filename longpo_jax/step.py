# SPDX-License-Identifier: Apache-2.0
"""One update of the policy: packed rows through the decoder, the objective, its gradient, the optimizer.

Weights are kept in float32 (at these learning rates bfloat16 would lose nearly every update) and cast to the dtype of
the arithmetic for each pass. They are split over fsdp and context (the table TRAINED) and gathered layer by layer; rows
are split over data and fsdp, a row over context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from longpo_jax.config import LongPOConfig, ObjectiveConfig
from longpo_jax.flops import flops_of, tokens_of
from longpo_jax.loss import WEIGHTS, objective
from longpo_jax.objectives import LogProbs, objective_of
from longpo_jax.remat import wrapping
from longpo_jax.rows import Row, batch_rows
from longpo_jax.scores import Batch, row_divergences, row_log_probs
from longpo_jax.soundness import all_finite
from longpo_jax.teacher import TEACHER, Teacher, batch_teachers
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.load import arithmetic
from rapid_jax.model.top_logprobs import TopLogProbs
from rapid_jax.runtime.axes import PARAM, spec_of
from rapid_jax.runtime.mesh import put_on_mesh

TOLD = ("finite", "weights_finite")  # of an update, besides its metrics; truth values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update changes."""

    step: jax.Array  # int32, updates made
    weights: Decoder
    moments: optax.OptState


@dataclass(frozen=True)
class Sample:
    """One row of training data with what the reference says of it."""

    id: str
    row: Row
    short: Row | None  # the same answers behind the excerpt, if the objective has such a row
    references: Mapping[str, float]  # log-probability sums by name
    teacher: Teacher | None = None  # its distributions at the rejected answers' tokens


def losses(decoder: Decoder, batch: Batch, config: ObjectiveConfig, **how: Any) -> tuple[jax.Array, dict]:
    """(mean loss of the rows, mean metrics by name); `how` is as in `row_log_probs`, and `short_tail` of short rows."""
    tail, short_tail = how.pop("tail"), how.pop("short_tail")
    given = {key.removeprefix("reference_"): x for key, x in batch.items() if key.startswith("reference_")}
    wanted = objective_of(config.name)
    if wanted.teacher:
        teacher = TopLogProbs(*(given[name] for name in TEACHER))
        policy, given = row_divergences(decoder, batch, teacher, tail=tail, nll=config.nll, **how), {}
    else:
        policy = row_log_probs(decoder, batch, tail=tail, nll=config.nll, **how)
    if wanted.short:
        long = policy
        short = {key.removeprefix("short_"): value for key, value in batch.items() if key.startswith("short_")}
        policy = row_log_probs(decoder, short, tail=short_tail, **how)
        policy |= {"long_chosen_B": long["chosen_B"], "nll_B": long["nll_B"]}
    loss_B, metrics = objective(config.name, policy, given, **{name: getattr(config, name) for name in WEIGHTS})
    return jnp.mean(loss_B), {name: jnp.mean(value) for name, value in metrics.items()}


class Step:
    """The compiled programs of training, for one configuration and mesh."""

    def __init__(self, config: LongPOConfig, decoder: Decoder, transform: optax.GradientTransformation):
        self.config, self.mesh, self.transform = config, decoder.mesh, transform
        train, compute = config.train, config.compute
        self.strategy = Strategy(train.attention_block, decoder.mesh, compute.kernel, compute.context)
        self.tail = train.tail if objective_of(config.objective.name).forked else 0
        self.dtype = arithmetic(config.model.dtype)
        self._wrap = wrapping(train.remat, offload=train.offload, mesh=decoder.mesh)
        self.gradients = jax.jit(self._gradients, donate_argnames="total")
        self.updated = jax.jit(self._update, donate_argnames="state")
        self.metrics = _metrics(config.objective.name)  # their names
        self.tokens = jax.jit(tokens_of)
        self.flops = jax.jit(partial(flops_of, decoder.config, config.objective.nll))

    def start(self, decoder: Decoder) -> TrainState:
        """Before the first update; the decoder's arrays become the state's."""
        weights = nnx.state(decoder, nnx.Param)
        places = None if self.mesh is None else jax.tree.map(lambda x: x.sharding, self.moments(decoder))
        moments = jax.jit(self.transform.init, out_shardings=places)(weights)
        return TrainState(put_on_mesh(self.mesh, jax.P(), np.int32(0)), decoder, moments)

    def moments(self, decoder: Decoder) -> optax.OptState:
        """The shapes of what the optimizer keeps of these weights or shapes, each lying as its weight does."""
        weights = nnx.state(decoder, nnx.Param)
        whole = None if self.mesh is None else NamedSharding(self.mesh, jax.P())

        def shaped(moment: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=sharding)

        return optax.tree.map_params(
            self.transform,
            lambda moment, weight: shaped(moment, None if self.mesh is None else weight.sharding),
            jax.eval_shape(self.transform.init, weights),
            weights,
            transform_non_params=lambda moment: shaped(moment, whole),
        )

    def zero_total(self, decoder: Decoder) -> Any:
        """The shapes of (the gradient's sum, of the metrics, microbatches so far)."""

        def shaped(shape: tuple[int, ...], sharding: Any) -> jax.ShapeDtypeStruct:
            # Told to lie on the one device, it would make what comes of it compile anew for the next update.
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=None if self.mesh is None else sharding)

        scalar = shaped((), None if self.mesh is None else NamedSharding(self.mesh, jax.P()))
        sums = jax.tree.map(lambda x: shaped(x.shape, x.sharding), nnx.state(decoder, nnx.Param))
        return sums, dict.fromkeys(self.metrics, scalar), scalar

    def place(self, samples: Sequence[Sample | None]) -> dict[str, jax.Array]:
        """The batch of one microbatch, a row for each of data * fsdp devices, on the mesh.

        A row that no device of this process holds may be None. All processes agree on the padded length.
        """
        rows = [sample.row for sample in samples if sample is not None]
        trunk = max(row.trunk for row in rows) if rows else 0
        shorts = [s.short for s in samples if s is not None and s.short is not None]
        short = max((row.trunk for row in shorts), default=0)
        if jax.process_count() > 1:
            every = multihost_utils.process_allgather(np.asarray([trunk, short], np.int32))
            trunk, short = (int(size) for size in np.max(every, axis=0))
        spare = next(s for s in samples if s is not None) if rows else None
        if spare is None:
            raise ValueError("a process places a microbatch of which it holds no row")
        full = [spare if sample is None else sample for sample in samples]
        devices = self.strategy.context
        arrays = dict(batch_rows([sample.row for sample in full], trunk=trunk, devices=devices))
        if short:
            of_short = batch_rows([s.short for s in full if s.short], trunk=short, devices=devices)
            arrays |= {f"short_{name}": array for name, array in of_short.items()}
        for name in full[0].references:
            values = np.asarray([sample.references[name] for sample in full], np.float32)
            arrays[f"reference_{name}_B"] = values
        taught = [(sample.teacher, sample.row) for sample in full if sample.teacher is not None]
        if taught:
            of_teacher = batch_teachers(*zip(*taught, strict=True), devices=devices)
            arrays |= {f"reference_{name}": array for name, array in of_teacher.items()}
        return {name: put_on_mesh(self.mesh, self.strategy.spec(name), array) for name, array in arrays.items()}

    def accumulate(self, state: TrainState, total: Any, batch: Batch) -> Any:
        """`total` (None before the first microbatch of an update) with this one's gradient and metrics added."""
        if total is None:
            total = jax.tree.map(_zeros, self.zero_total(state.weights))
        return self.gradients(state.weights, total, batch)

    def update(self, state: TrainState, total: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """(state after one update, means of the metrics, with grad_norm and TOLD). The given state is used up.

        finite: loss and gradient are; if not, the state comes back as it was. weights_finite: so are the weights that
        came of it, which do not come back: a second copy of them would have to be kept.
        """
        return self.updated(state, total)

    def policy(self, weights: Decoder) -> Decoder:
        """The weights in the dtype of the arithmetic; those outside of the layers split over `model` alone."""
        decoder = jax.tree.map(lambda x: x.astype(self.dtype), weights)
        for name in ("embed_VD", "norm_D", "head_DV"):
            parameter = getattr(decoder, name)
            if parameter is not None and self.mesh is not None:
                sharding = NamedSharding(self.mesh, spec_of(name, {**PARAM, "D": None}))
                parameter[...] = lax.with_sharding_constraint(parameter[...], sharding)
        return decoder

    def _gradients(self, weights: Decoder, total: Any, batch: Batch) -> Any:
        graph, state = nnx.split(weights, nnx.Param)
        how = {"strategy": self.strategy, "logits_chunk": self.config.train.logits_chunk, "wrap": self._wrap}
        tails = {"tail": self.tail, "short_tail": self.config.train.tail}

        def loss(state):
            decoder = self.policy(nnx.merge(graph, state))
            return losses(decoder, batch, self.config.objective, **how, **tails)

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        sums, metric_sums, count = total
        sums = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, gradient)
        return sums, {name: metric_sums[name] + value for name, value in metrics.items()}, count + 1

    def _update(self, state: TrainState, total: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        sums, metrics, count = total
        gradient = jax.tree.map(lambda x: x / count, sums)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        graph, weights = nnx.split(state.weights, nnx.Param)
        updates, moments = self.transform.update(gradient, state.moments, weights)
        moved = optax.apply_updates(weights, updates)

        def kept(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new = kept(moved, weights)
        told = {"finite": finite, "weights_finite": all_finite(new)}
        state = TrainState(kept(state.step + 1, state.step), nnx.merge(graph, new), kept(moments, state.moments))
        means = {name: value / count for name, value in metrics.items()}
        return state, means | {"grad_norm": norm} | told


def _metrics(name: str) -> tuple[str, ...]:
    names = ("nll_B", "chosen_B", "rejected_B", "long_chosen_B", "kl_B", "teacher_rest_B")
    scores: LogProbs = dict.fromkeys(names, jnp.zeros(1))
    weights = dict.fromkeys(WEIGHTS, 1.0)
    return tuple(jax.eval_shape(lambda: objective(name, scores, scores, **weights)[1]))


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
