# SPDX-License-Identifier: Apache-2.0
"""Working memory of a run's programs on one GPU, by rule: there is no compiler for it here to ask.

What lies beside the arrays that stay. Rules are upper bounds where XLA may or may not fuse; what is outside of JAX's
own memory (the context of CUDA, code, workspaces of cuBLAS and cuDNN) is not part of them.
"""

import jax

from rapid_jax.plan.models import PlannedModel
from rapid_jax.speculative.prefill import LARGEST_BLOCK
from rapid_jax.speculative.state import Plan

FLOAT32 = 4


def of_prefill(model: PlannedModel) -> int:
    """Of one chunk of T tokens in one layer: x and its norm, the new keys and values, and the larger of

    the MLP's gate and up in float32 (or, of experts, what goes in and out of every one that a token goes to, and
    between), and attention's: q, k, v before and after their rotation, two outputs in float32
    (over the prefix, over the chunk), and scores and weights of one tile. cuDNN holds none, but the program has room
    for the plain XLA that takes what cuDNN cannot. A quantised matrix is restored before it meets so many rows.
    """
    config, item, tokens = model.decoder.config, model.dtype.itemsize, model.layout.chunk
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    kept = 2 * item * (config.hidden_size + config.num_kv_heads * config.head_dim)
    tile = 2 * FLOAT32 * config.num_heads * min(tokens, LARGEST_BLOCK) ** 2
    attention = tokens * (2 * item * heads + 2 * FLOAT32 * config.num_heads * config.head_dim) + tile
    widths = [config.intermediate_size] if not all(kind.experts for kind in config.kinds) else []
    mlp = 2 * FLOAT32 * config.intermediate_size
    if (experts := config.experts) is not None:
        widths.append(experts.ffn)  # restored one at a time
        mlp = experts.per_token * ((item + FLOAT32) * config.hidden_size + 3 * item * experts.ffn)
    restored = 0 if model.bits is None else 2 * FLOAT32 * config.hidden_size * max(widths)
    return tokens * kept + max(attention, tokens * mlp) + restored


def of_round(plan: Plan) -> int:
    """Logits of the tokens that both models see, float32, four times: as read, warped, sorted, as probabilities."""
    tokens = max(plan.gamma, plan.copies) + 1
    return 2 * tokens * plan.vocabulary * FLOAT32 * 4


def of_quantized_matrix(model: PlannedModel) -> int:
    """The largest matrix, the head or gate and up, turned in float32."""
    config = model.decoder.config
    return FLOAT32 * max(config.vocab_size, 2 * config.intermediate_size) * config.hidden_size


def of_quantized_keys(k_BKSH: jax.Array) -> int:
    """The quantised keys with a scale a slot. Of values, as many, the full keys have left room to turn them in."""
    return k_BKSH.size + FLOAT32 * (k_BKSH.size // k_BKSH.shape[-1])
