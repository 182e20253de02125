# SPDX-License-Identifier: Apache-2.0
"""Our decoder against transformers on the same checkpoint: logits beyond 8,192 positions, bfloat16, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.hf_io import load_hf
from tests.model.conftest import FAMILIES, forward_of, our_logits, tokens_at, torch_logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_around_8192_positions_and_at_30000(name, checkpoint):
    model, folder = checkpoint(name)
    forwards = [
        forward_of(load_hf(folder, layout=layout, dtype=jnp.float32, quiet=True)) for layout in ("stacked", "unrolled")
    ]
    for start in (8100, 30000):
        tokens_BT, pos_BT = tokens_at(start, 300, windows=name == "gemma3")
        expected = torch_logits(model, tokens_BT, pos_BT)
        # The yardstick of a rounding difference is the size of the logits, which are of order ten here.
        size = np.abs(expected).max()
        assert size > 1
        for forward in forwards:
            np.testing.assert_allclose(forward(tokens_BT, pos_BT), expected, atol=1e-4 * size, rtol=0)


def test_logits_of_8300_tokens_equal_transformers(checkpoint):
    model, folder = checkpoint("llama3")
    tokens_BT = np.random.default_rng(1).integers(0, 101, (1, 8300))
    pos_BT = np.arange(8300)[None]
    expected = torch_logits(model, tokens_BT, pos_BT)
    ours = our_logits(load_hf(folder, layout="stacked", dtype=jnp.float32, quiet=True), tokens_BT, pos_BT)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_a_wrong_rope_base_would_be_noticed(checkpoint):
    model, folder = checkpoint("llama")
    decoder = load_hf(folder, layout="stacked", dtype=jnp.float32, quiet=True)
    tokens_BT, pos_BT = tokens_at(8100, 300)
    wrong = our_logits(decoder, tokens_BT, pos_BT + np.arange(300) // 100)
    assert np.abs(wrong - torch_logits(model, tokens_BT, pos_BT)).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_bfloat16_is_no_further_from_float32_than_transformers_bfloat16(name, checkpoint):
    model, folder = checkpoint(name)
    tokens_BT, pos_BT = tokens_at(8100, 300)
    truth = torch_logits(model, tokens_BT, pos_BT)
    theirs = torch_logits(type(model).from_pretrained(folder, dtype=torch.bfloat16).eval(), tokens_BT, pos_BT)
    ours = our_logits(load_hf(folder, layout="unrolled", dtype=jnp.bfloat16, quiet=True), tokens_BT, pos_BT)

    def distance(logits):
        return np.sqrt(np.mean((logits - truth) ** 2))

    assert 0 < distance(ours) <= 1.1 * distance(theirs)


def test_gradients_of_both_layouts_equal_torch(checkpoint):
    model, folder = checkpoint("qwen2")
    tokens_BT, pos_BT = tokens_at(9000, 40)
    tokens, pos = jnp.asarray(tokens_BT), jnp.asarray(pos_BT)

    def loss(decoder):
        hidden_BTD, _ = decoder.hidden(tokens, pos, attend_self(pos, Strategy(block=16)))
        return jnp.mean(jax.nn.logsumexp(decoder.logits(hidden_BTD), axis=-1))

    gradients = {}
    for layout in ("stacked", "unrolled"):
        gradient = nnx.jit(nnx.grad(loss))(load_hf(folder, layout=layout, dtype=jnp.float32, quiet=True))
        gradients[layout] = dict(nnx.to_flat_state(gradient))
    for path, stacked in gradients["stacked"].items():
        if path[0] == "blocks":
            rows = [gradients["unrolled"]["blocks", layer, path[1]][...] for layer in range(2)]
            np.testing.assert_allclose(stacked[...], jnp.stack(rows), atol=1e-6, err_msg=str(path))
        else:
            np.testing.assert_allclose(stacked[...], gradients["unrolled"][path][...], atol=1e-6, err_msg=str(path))

    model.zero_grad()
    mask = torch.ones_like(torch.from_numpy(tokens_BT))
    out = model(
        torch.from_numpy(tokens_BT), position_ids=torch.from_numpy(pos_BT), attention_mask=mask, use_cache=False
    )
    torch.logsumexp(out.logits, -1).mean().backward()
    theirs = dict(model.named_parameters())["model.layers.1.self_attn.q_proj.weight"].grad.numpy()
    ours = np.asarray(gradients["unrolled"]["blocks", 1, "q_DNH"][...]).reshape(32, -1).T
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
