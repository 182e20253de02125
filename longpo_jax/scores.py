# SPDX-License-Identifier: Apache-2.0
"""What a model says of packed rows, while it is trained and as the frozen reference; to be traced.

row_log_probs      sums over the answers, and the NLL
row_top            the teacher of on-policy self-distillation: its distributions at the tail's places
row_divergences    the student: how far its distributions are from those, and the NLL
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from longpo_jax.rows import REJECTED
from rapid_jax.attention.attend import attend_fork
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder, Wrap
from rapid_jax.model.logprobs import token_log_probs
from rapid_jax.model.top_logprobs import TopLogProbs, reverse_kl, top_log_probs

# PLACES and reach_B; reference_*_B; of solopo also short_PLACES and short_reach_B; of opsd reference_TEACHER.
Batch: TypeAlias = Mapping[str, Any]


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
    hidden_BTD = _hidden(decoder, batch, strategy, tail, wrap)
    answers_BT, trunk_BT, nll_BT = _count(batch, nll)
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


def row_top(
    decoder: Decoder,
    batch: Batch,
    *,
    strategy: Strategy,
    tail: int,
    logits_chunk: int,
    k: int,
    wrap: Wrap | None = None,
) -> TopLogProbs:
    """The model's distributions at the `tail` places of each row's tail, in the devices' order.

    They are of use where an answer's token is predicted; other places may hold anything.
    """
    hidden_BTD = _hidden(decoder, batch, strategy, tail, wrap)
    answers_BT = _tail_of(_count(batch, None)[0], strategy, tail)
    weight, axes = decoder.head
    how = axes, logits_chunk, strategy.mesh
    return top_log_probs(_tail_of(hidden_BTD, strategy, tail), weight, answers_BT, *how, k=k)


def row_divergences(
    decoder: Decoder,
    batch: Batch,
    teacher: TopLogProbs,
    *,
    strategy: Strategy,
    tail: int,
    logits_chunk: int,
    nll: str | None = None,
    wrap: Wrap | None = None,
) -> dict[str, jax.Array]:
    """kl_B, float32: the mean over the answers' tokens of the tail of the reverse KL divergence to the teacher.

    `teacher` is [B, tail, ...] in the devices' order. teacher_rest_B is the mean of the probability that it gives to
    others than its k tokens; nll_B as in `row_log_probs`.
    """
    hidden_BTD = _hidden(decoder, batch, strategy, tail, wrap)
    answers_BT, _, nll_BT = _count(batch, nll)
    weight, axes = decoder.head
    how = axes, logits_chunk, strategy.mesh
    learnt_BT = _tail_of(answers_BT, strategy, tail)
    kl_BT: jax.Array = reverse_kl(  # type: ignore[assignment]
        _tail_of(hidden_BTD, strategy, tail), weight, teacher, learnt_BT, *how
    )
    count_B = jnp.maximum(jnp.sum(learnt_BT, axis=1), 1)
    rest_BT = jnp.where(learnt_BT, jnp.exp(teacher.rest_BT), 0.0)
    found = {"kl_B": jnp.sum(kl_BT, axis=1) / count_B, "teacher_rest_B": jnp.sum(rest_BT, axis=1) / count_B}
    if nll is not None:
        log_prob_BT: jax.Array = token_log_probs(  # type: ignore[assignment]
            hidden_BTD, weight, batch["targets_BT"], nll_BT, *how
        )
        found["nll_B"] = -jnp.sum(log_prob_BT, axis=1) / jnp.maximum(jnp.sum(nll_BT, axis=1), 1)
    return found


def _hidden(decoder: Decoder, batch: Batch, strategy: Strategy, tail: int, wrap: Wrap | None) -> jax.Array:
    attend = attend_fork(batch["pos_BT"], batch["reach_B"], strategy, tail=tail // strategy.context)
    return decoder.hidden(batch["tokens_BT"], batch["pos_BT"], attend, wrap=wrap)[0]


def _count(batch: Batch, nll: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which places predict a token of an answer, which hold one of the trunk, which of these count in the NLL."""
    filled_BT = batch["pos_BT"] >= 0
    answers_BT = (batch["turn_BT"] > 0) & filled_BT
    trunk_BT = (batch["branch_BT"] != REJECTED) & filled_BT
    nll_BT = trunk_BT & (batch["turn_BT"] >= 0) if nll == "full" else trunk_BT & answers_BT
    return answers_BT, trunk_BT, nll_BT


def _tail_of(x_BT: jax.Array, strategy: Strategy, tail: int) -> jax.Array:
    """[B, T, ...] -> [B, tail, ...]: of each device's places those of the tail, which lie behind its trunk's."""
    B, T = x_BT.shape[:2]
    devices = strategy.context
    parts = x_BT.reshape(B, devices, T // devices, *x_BT.shape[2:])
    return parts[:, :, T // devices - tail // devices :].reshape(B, tail, *x_BT.shape[2:])
