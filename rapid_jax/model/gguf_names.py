# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp's files call the weights that Hugging Face's name otherwise."""

import re
from typing import Final

from rapid_jax.model.hf_names import EMBEDDING, HEAD

ROPE_FACTORS: Final = "rope_freqs.weight"  # of llama.cpp alone: the divisors of Llama 3's rope scaling
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # longrope's, of config.json
_PARTS: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
}
_POST_NORMS: Final = _PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE: Final = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}


def gguf_name(key: str, *, post_norms: bool = False) -> str:
    """The GGUF name of a Hugging Face key: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight.

    A matrix of all experts is one tensor: model.layers.3.mlp.experts.7.up_proj.weight -> blk.3.ffn_up_exps.weight.
    `post_norms`: of a model that normalises after attention and the MLP, too.
    """
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    layer, part = key.removeprefix("model.layers.").split(".", 1)
    stem, _, kind = re.sub(r"\.experts\.\d+\.", ".experts.", part).rpartition(".")
    return f"blk.{layer}.{(_POST_NORMS if post_norms else _PARTS)[stem]}.{kind}"
