# SPDX-License-Identifier: Apache-2.0
"""The objectives: sums of log-probabilities in, a loss out. Pure functions of float arrays [B], one item a document.

LongPO (arXiv 2502.13922, Eq. 12 to 14, in the form that its released code computes):

    r_c = beta (P_c - R_c)      chosen reward: policy on the long context over reference on the SHORT one
    r_r = beta (P_r - R_r)      rejected reward, its reference on the short context, too
    L   = nll_weight * NLL + preference_weight * softplus(-(r_c - r_r))

P and R are sums over the answer tokens of all turns: one sigmoid a document. Eq. 13 prints sums of probabilities inside
the logarithms; a single turn would dominate those, and the released code adds logarithms, as here. The paper has
preference_weight (lambda) 0.01 and nll_weight 1, the NLL over the whole chosen sequence with the document.

dpo       the same with both references on the LONG context
sft       the NLL alone
solopo    preference on the short context, the chosen answer's reward drawn to be the same on the long one
opsd      on-policy self-distillation (arXiv 2604.17535): no preference; the model's own answers from the long context,
          which are the rejected ones, with the reference on the SHORT context as the teacher of every token:

              L = nll_weight * NLL + distillation_weight * mean over the answers' tokens of KL(policy || teacher)

          The rule is the abstract's (a reverse KL divergence at each token of answers from the long context, the
          teacher on the short one). Ours: the teacher is frozen, and known by its top_k tokens and one bucket for all
          others (`top_logprobs.reverse_kl`; arXiv 2608.14728 argues for the bucket); the mean is over a document; the
          NLL of the chosen sequence may be added, nll_weight 0 leaves it out. Answers are those of the model before
          training: on-policy at the first update, renewed by every round.
"""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from longpo_jax.objectives import LogProbs, objective_of

Metrics: TypeAlias = dict[str, jax.Array]
WEIGHTS = ("beta", "preference_weight", "nll_weight", "alpha", "distillation_weight")  # settings of `objective`


def preference(rewards_chosen_B: jax.Array, rewards_rejected_B: jax.Array) -> jax.Array:
    """[B]: -log sigmoid of the margin, finite for any margin (Bradley-Terry; Eq. 6)."""
    return jax.nn.softplus(-(rewards_chosen_B - rewards_rejected_B))


def objective(
    name: str,
    policy: LogProbs,
    reference: LogProbs,
    *,
    beta: float,
    preference_weight: float,
    nll_weight: float,
    alpha: float,
    distillation_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss [B], metrics [B] by name).

    policy     nll_B, and unless sft: chosen_B, rejected_B; solopo: of the short context, and long_chosen_B; opsd: kl_B
               instead, the mean divergence to the teacher, and teacher_rest_B, what it gives to no token of its own
    reference  chosen_B, rejected_B; solopo: and long_chosen_B; sft and opsd: nothing. No gradient reaches them.
    """
    record = objective_of(name)
    weights = {"beta": beta, "preference_weight": preference_weight, "alpha": alpha}
    weights["distillation_weight"] = distillation_weight
    nll_B = policy["nll_B"]
    metrics = {"nll": nll_B}
    loss_B = nll_weight * nll_B
    if record.loss is not None:
        reference = {key: jax.lax.stop_gradient(value) for key, value in reference.items()}
        more_B, found = record.loss(policy, reference, weights)
        loss_B += more_B
        metrics |= found
    return loss_B, metrics | {"loss": loss_B}


def preferred(policy: LogProbs, reference: LogProbs, weights: Mapping[str, float]) -> tuple[jax.Array, Metrics]:
    """longpo and dpo: (preference_weight * preference loss [B], metrics)."""
    chosen_B, rejected_B = rewards(policy, reference, weights)
    preference_B = preference(chosen_B, rejected_B)
    return weights["preference_weight"] * preference_B, _metrics(preference_B, chosen_B, rejected_B)


def aligned(policy: LogProbs, reference: LogProbs, weights: Mapping[str, float]) -> tuple[jax.Array, Metrics]:
    """solopo: as `preferred`, with alpha times the distance of the chosen answer's two rewards in the loss."""
    chosen_B, rejected_B = rewards(policy, reference, weights)
    long_B = weights["beta"] * (policy["long_chosen_B"] - reference["long_chosen_B"])
    alignment_B = jnp.abs(chosen_B - long_B)
    preference_B = preference(chosen_B, rejected_B) + weights["alpha"] * alignment_B
    metrics = {"alignment": alignment_B} | _metrics(preference_B, chosen_B, rejected_B)
    return weights["preference_weight"] * preference_B, metrics


def rewards(policy: LogProbs, reference: LogProbs, weights: Mapping[str, float]) -> tuple[jax.Array, jax.Array]:
    """[B] each: of the chosen and of the rejected answers, Eq. 12."""
    beta = weights["beta"]
    return beta * (policy["chosen_B"] - reference["chosen_B"]), beta * (policy["rejected_B"] - reference["rejected_B"])


def _metrics(preference_B: jax.Array, chosen_B: jax.Array, rejected_B: jax.Array) -> Metrics:
    return {
        "preference": preference_B,
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": chosen_B - rejected_B,
        "rewards/accuracies": (chosen_B > rejected_B).astype(jnp.float32),
    }
