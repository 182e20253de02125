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
from longpo_jax.loss import objective
from longpo_jax.remat import wrapping
from longpo_jax.rows import REJECTED, Row, batched
from longpo_jax.soundness import all_finite
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.verbs import attend_fork
from rapid_jax.model.decoder import Decoder, Wrap
from rapid_jax.model.load import arithmetic
from rapid_jax.model.logprobs import token_log_probs
from rapid_jax.runtime.axes import PARAM, spec_of
from rapid_jax.runtime.mesh import placed

TOLD = ("finite", "weights_finite")  # of an update, besides its metrics; truth values
Batch = Mapping[str, Any]  # PLACES and reach_B; reference_*_B; of solopo also short_PLACES and short_reach_B


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
    short: Row | None  # of solopo: the same answers behind the excerpt
    references: Mapping[str, float]  # log-probability sums: chosen, rejected; of solopo also long_chosen


def row_log_probs(
    decoder: Decoder,
    batch: Batch,
    *,
    strategy: Strategy,
    tail: int,
    logits_chunk: int,
    nll: str | None = None,
    wrap: Wrap | None = None,
) -> dict[str, jax.Array]:
    """chosen_B and rejected_B, float32: sums of log p(answer tokens) over all turns of a packed row.

    With `nll` also nll_B, the mean of -log p over the chosen sequence: "full" over all of it, the document included,
    "response" over its answer tokens. Places without a token never count. `tail` places of the row are its tail.
    """
    devices = strategy.context
    attend = attend_fork(batch["pos_BT"], batch["reach_B"], strategy, tail=tail // devices)
    hidden_BTD, _ = decoder.hidden(batch["tokens_BT"], batch["pos_BT"], attend, wrap=wrap)
    answers_BT = (batch["turn_BT"] > 0) & (batch["pos_BT"] >= 0)
    trunk_BT = (batch["branch_BT"] != REJECTED) & (batch["pos_BT"] >= 0)
    nll_BT = trunk_BT & (batch["turn_BT"] >= 0) if nll == "full" else trunk_BT & answers_BT
    counts_BT = answers_BT if nll is None else answers_BT | nll_BT
    weight, axes = decoder.head
    log_prob_BT: jax.Array = token_log_probs(  # type: ignore[assignment]
        hidden_BTD, weight, batch["targets_BT"], counts_BT, axes, logits_chunk, strategy.mesh
    )

    def total(where_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where_BT, log_prob_BT, 0.0), axis=1)

    found = {"chosen_B": total(answers_BT & trunk_BT), "rejected_B": total(answers_BT & ~trunk_BT)}
    if nll is not None:
        found["nll_B"] = -total(nll_BT) / jnp.maximum(jnp.sum(nll_BT, axis=1), 1)
    return found


def losses(decoder: Decoder, batch: Batch, config: ObjectiveConfig, **how: Any) -> tuple[jax.Array, dict]:
    """(mean loss of the rows, mean metrics by name); `how` is as in `row_log_probs`, and `short_tail` of short rows."""
    tail, short_tail = how.pop("tail"), how.pop("short_tail")
    policy = row_log_probs(decoder, batch, tail=tail, nll=config.nll, **how)
    if config.name == "solopo":
        long = policy
        short = {key.removeprefix("short_"): value for key, value in batch.items() if key.startswith("short_")}
        policy = row_log_probs(decoder, short, tail=short_tail, **how)
        policy |= {"long_chosen_B": long["chosen_B"], "nll_B": long["nll_B"]}
    reference = {key.removeprefix("reference_"): x for key, x in batch.items() if key.startswith("reference_")}
    weights = {name: getattr(config, name) for name in ("beta", "preference_weight", "nll_weight", "alpha")}
    loss_B, metrics = objective(config.name, policy, reference, **weights)
    return jnp.mean(loss_B), {name: jnp.mean(value) for name, value in metrics.items()}


class Step:
    """The compiled programs of training, for one configuration and mesh."""

    def __init__(self, config: LongPOConfig, decoder: Decoder, transform: optax.GradientTransformation):
        self.config, self.mesh, self.transform = config, decoder.mesh, transform
        train, compute = config.train, config.compute
        self.strategy = Strategy(train.attention_block, decoder.mesh, compute.kernel, compute.context)
        self.tail = 0 if config.objective.name in ("sft", "solopo") else train.tail
        self.dtype = arithmetic(config.model.dtype)
        self._wrap = wrapping(train.remat, offload=train.offload, mesh=decoder.mesh)
        self.gradients = jax.jit(self._gradients, donate_argnames="total")
        self.updated = jax.jit(self._updated, donate_argnames="state")
        self.metrics = _metrics(config.objective.name)  # their names
        self.tokens = jax.jit(tokens_of)
        self.flops = jax.jit(partial(flops_of, decoder.config, config.objective.nll))

    def start(self, decoder: Decoder) -> TrainState:
        """Before the first update; the decoder's arrays become the state's."""
        weights = nnx.state(decoder, nnx.Param)
        places = None if self.mesh is None else jax.tree.map(lambda x: x.sharding, self.moments(decoder))
        moments = jax.jit(self.transform.init, out_shardings=places)(weights)
        return TrainState(placed(self.mesh, jax.P(), np.int32(0)), decoder, moments)

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
        arrays = dict(batched([sample.row for sample in full], trunk=trunk, devices=devices))
        if short:
            of_short = batched([s.short for s in full if s.short], trunk=short, devices=devices)
            arrays |= {f"short_{name}": array for name, array in of_short.items()}
        for name in full[0].references:
            values = np.asarray([sample.references[name] for sample in full], np.float32)
            arrays[f"reference_{name}_B"] = values
        return {name: placed(self.mesh, self.strategy.spec(name), array) for name, array in arrays.items()}

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

    def _updated(self, state: TrainState, total: Any) -> tuple[TrainState, dict[str, jax.Array]]:
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
    scores = {
        "nll_B": jnp.zeros(1),
        "chosen_B": jnp.zeros(1),
        "rejected_B": jnp.zeros(1),
        "long_chosen_B": jnp.zeros(1),
    }
    weights = {"beta": 1.0, "preference_weight": 1.0, "nll_weight": 1.0, "alpha": 1.0}
    return tuple(jax.eval_shape(lambda: objective(name, scores, scores, **weights)[1]))


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
