# SPDX-License-Identifier: Apache-2.0
"""Families whose layers are more than Llama's: random configs of each against transformers, and what is refused."""

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.hf_io import load_hf, save_hf
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import generate
from tests.model.conftest import SIZES, tokens_at, torch_logits
from tests.speculative.models import prompted

DRAWS = 20
# (hidden size, query heads, kv heads, size of a head): few, so that draws share what is compiled
HEADS = ((32, 4, 2, 16), (48, 6, 6, 8))
EXPERTS = ((6, 2), (4, 4), (5, 1))  # how many there are, a token's
CONFIGS = {
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "smollm3": "SmolLM3Config",
    "phi3": "Phi3Config",
    "gemma3_text": "Gemma3TextConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
}
WINDOWS = (1, 7, 16, 17, 64)  # the tests' prompts are of 24 and, for greedy tokens, 120
MESHES = {  # for greedy tokens
    "qwen3": MeshConfig(context=2, model=2),
    "gemma3_text": MeshConfig(model=2),
    "qwen3_moe": MeshConfig(context=2, model=2),
}
ALIKE = {"qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []}}  # layers that can be stacked
LAYOUTS: tuple[Layout, ...] = ("stacked", "unrolled")


def drawn(family: str, draw: int) -> dict[str, Any]:
    """Keys of a random config of the family."""
    rng = random.Random(f"{family} {draw}")
    hidden, heads, kv_heads, head_dim = rng.choice(HEADS)
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    found = SIZES | sizes | {"tie_word_embeddings": rng.random() < 0.5, "rms_norm_eps": rng.choice((1e-5, 1e-6))}
    found |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    found |= {"max_position_embeddings": 40960, "rope_theta": rng.choice((1e4, 1e6, 5e6))}
    found |= {"dtype": rng.choice(("float32", "bfloat16", "float16"))}  # of the file
    return found | OF_FAMILY[family](rng, head_dim)


def _mistral(rng: random.Random, head_dim: int) -> dict[str, Any]:
    return {"head_dim": head_dim, "sliding_window": rng.choice((None, *WINDOWS))}


def _qwen2(rng: random.Random, head_dim: int) -> dict[str, Any]:
    """Its heads are of hidden_size / num_attention_heads."""
    del head_dim
    some = {"max_window_layers": 1} | rng.choice(({}, {"layer_types": ["sliding_attention", "full_attention"]}))
    windows = rng.choice((some, some, {"max_window_layers": 0}, {"use_sliding_window": False}))
    return {"rope_scaling": _scaling(rng), "use_sliding_window": True, "sliding_window": rng.choice(WINDOWS)} | windows


def _qwen3(rng: random.Random, head_dim: int) -> dict[str, Any]:
    windows = {"use_sliding_window": rng.random() < 0.5, "sliding_window": rng.choice(WINDOWS)}
    return {"head_dim": head_dim, "rope_scaling": _scaling(rng), "max_window_layers": rng.choice((0, 1, 2))} | windows


def _smollm3(rng: random.Random, head_dim: int) -> dict[str, Any]:
    """Its heads are of hidden_size / num_attention_heads, or of another size."""
    del head_dim
    stated = {"no_rope_layers": rng.choice(([1, 0], [0, 1], [0, 0], [1, 1, 0]))}
    layers = rng.choice((stated, stated, {"no_rope_layer_interval": 2}, {}))
    windows = {"use_sliding_window": rng.random() < 0.5, "sliding_window": rng.choice(WINDOWS)}
    return {"rope_scaling": _scaling(rng), **windows, **layers}


def _phi3(rng: random.Random, head_dim: int) -> dict[str, Any]:
    """Its heads are of 8; the tests' positions are all behind the original context, with the last one, or none is."""
    del head_dim
    fraction = rng.choice((1.0, 0.75, 0.5))
    tops = {"short_factor": 2, "long_factor": 30}
    longrope = {key: [rng.uniform(1, top) for _ in range(int(4 * fraction))] for key, top in tops.items()}
    longrope |= {"rope_type": "longrope"} | rng.choice(({}, {"factor": 8.0}, {"attention_factor": 1.2}))
    found = {"partial_rotary_factor": fraction, "sliding_window": rng.choice((None, 262144, *WINDOWS))}
    found |= {"original_max_position_embeddings": rng.choice((16, 16, 40960))}
    return found | {"rope_scaling": rng.choice((None, longrope, longrope))}


def _gemma3(rng: random.Random, head_dim: int) -> dict[str, Any]:
    """Its scores are divided by the root of another number than the size of a head, in half of them."""
    found = {"head_dim": head_dim, "query_pre_attn_scalar": rng.choice((head_dim, head_dim, 24, 7))}
    scaling = rng.choice((None, None, {"rope_type": "linear", "factor": 8.0}))
    types = rng.choice((["sliding_attention", "full_attention"], ["full_attention", "sliding_attention"]))
    layers = rng.choice(({"layer_types": types}, {"sliding_window_pattern": 2}, {}))
    found |= {"rope_local_base_freq": rng.choice((1e4, 3e3)), "sliding_window": rng.choice((*WINDOWS, 65536))}
    return found | layers | {"rope_scaling": scaling}


def _qwen3_moe(rng: random.Random, head_dim: int) -> dict[str, Any]:
    """Some with an MLP in one of the two layers."""
    count, chosen = rng.choice(EXPERTS)
    found = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": 24, "head_dim": head_dim}
    found |= rng.choice(({}, {}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}))
    found |= {"use_sliding_window": rng.random() < 0.3, "sliding_window": rng.choice(WINDOWS)}
    return found | {"norm_topk_prob": rng.random() < 0.5, "rope_scaling": _scaling(rng)}


def _mixtral(rng: random.Random, head_dim: int) -> dict[str, Any]:
    count, chosen = rng.choice(EXPERTS)
    found = {"num_local_experts": count, "num_experts_per_tok": chosen, "head_dim": head_dim}
    return found | {
        "intermediate_size": 24,
        "sliding_window": rng.choice((None, *WINDOWS)),
        "rope_scaling": _scaling(rng),
    }


def _scaling(rng: random.Random) -> dict[str, Any] | None:
    factor = rng.choice((2.0, 4.0))
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 8192}
    return rng.choice((None, yarn, yarn | {"attention_factor": 1.1}, {"rope_type": "linear", "factor": factor}))


OF_FAMILY = {
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "gemma3_text": _gemma3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def saved(family: str, given: dict[str, Any], folder: Path) -> transformers.PreTrainedModel:
    """A random model of such a config, in float32 as the folder has it."""
    dtype = getattr(torch, given["dtype"])
    config = getattr(transformers, CONFIGS[family])(**{key: given[key] for key in given if key != "dtype"})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # norms start at one or zero, which would hide a mistake
                value.add_(torch.randn_like(value) * 0.2)
    model.to(dtype).save_pretrained(folder)  # which rounds the frequencies that the model in memory has, too
    return read_back(folder)


def read_back(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plainly(decoder: Decoder, tokens_BT: np.ndarray, pos_BT: np.ndarray) -> np.ndarray:
    """Logits, operation by operation: nothing is compiled for one config alone."""
    behind = jnp.asarray(pos_BT[:, None, None, :, None] - pos_BT[:, None, None, None, :])

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, window=np.inf):
        B, T, N, H = q_BTNH.shape
        q_BTKRH = q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)
        scores = jnp.einsum("btkrh,bskh->bkrts", q_BTKRH, k_BTKH, precision="highest") * H**-0.5
        weights = jax.nn.softmax(jnp.where((behind >= 0) & (behind < window), scores, -jnp.inf))
        return jnp.einsum("bkrts,bskh->btkrh", weights, v_BTKH, precision="highest").reshape(B, T, N, H), layer

    hidden_BTD, _ = decoder.hidden(jnp.asarray(tokens_BT), jnp.asarray(pos_BT), attend)
    return np.asarray(decoder.logits(hidden_BTD))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("draw", range(DRAWS))
def test_a_random_config_is_read_as_transformers_reads_it_and_exported_so(family: str, draw: int, tmp_path: Path):
    model = saved(family, drawn(family, draw), tmp_path / "given")
    decoder = load_hf(tmp_path / "given", layout="unrolled", dtype=jnp.dtype("float32"), quiet=True)
    save_hf(tmp_path / "written", decoder, dtype="float32", files={})
    back = read_back(tmp_path / "written")
    assert type(back) is type(model)
    windows = any(decoder.config.window_of)
    for start in (1, 8180):
        tokens_BT, pos_BT = tokens_at(start, 24, windows=windows)
        expected = torch_logits(model, tokens_BT, pos_BT)
        size = np.abs(expected).max()
        assert size > 1
        np.testing.assert_allclose(plainly(decoder, tokens_BT, pos_BT), expected, atol=1e-4 * size, rtol=0)
        np.testing.assert_allclose(torch_logits(back, tokens_BT, pos_BT), expected, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_with_a_drafter_of_the_family(family: str, tmp_path: Path):
    """Prefilled by chunks, on a mesh where there is one; drafted by a copy in 8 bits, in the other layout."""
    given = drawn(family, 0) | {"dtype": "float32", "vocab_size": 104} | ALIKE.get(family, {})
    model = saved(family, given, tmp_path)
    sizes = MESHES.get(family)
    mesh = None if sizes is None else make_mesh(sizes, jax.devices()[: sizes.devices])
    how: dict[str, Any] = {"dtype": jnp.dtype("float32"), "mesh": mesh, "quiet": True}
    target, drafter = (load_hf(tmp_path, layout=layout, **how) for layout in LAYOUTS)
    prompt = tokens_at(0, 120)[0][0].tolist()
    with torch.no_grad():
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": 12, "do_sample": False, "use_cache": False}  # its cache never forgets at window 1
        every = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    found = generate(
        prompted(fuse(target), [prompt], chunk=32),
        prompted(quantize(drafter, 8), [prompt[60:]], chunk=32),
        speculation=SpeculationConfig(mode="lossless", gamma=2, lookup="off"),
        sampling=SamplingConfig(temperature=0, max_new_tokens=12),
        stops=(),
    )
    assert found.tokens == [every[0, len(prompt) :].tolist()]
    assert sum(found.drafted) > 0
