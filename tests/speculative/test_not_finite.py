# SPDX-License-Identifier: Apache-2.0
"""Logits that are not numbers end the command with the reason; they never pass for an answer."""

import math
from dataclasses import replace
from typing import Literal

import jax
import numpy as np
import pytest

from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.model.finite import why_not_finite
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.rope import Rope
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from tests.speculative.conftest import VOCABULARY
from tests.speculative.models import Weights, prompted

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.lively(VOCABULARY)


def spoilt(weights: Weights, key: str, value: float, at=0) -> Weights:
    array = weights.arrays[key].copy()
    array.reshape(-1)[at] = value
    return Weights(weights.config, {**weights.arrays, key: array})


def said(
    target: Prompted,
    drafter: Prompted | None = None,
    *,
    temperature: float = 0.0,
    lookup: Literal["off", "on"] = "off",
    **more,
) -> str:
    """The error of an answer that must be one."""
    with pytest.raises(InputError) as caught:
        generate(
            target,
            drafter,
            speculation=SpeculationConfig(mode="lossless", gamma=2, lookup=lookup),
            sampling=SamplingConfig(temperature=temperature, max_new_tokens=8),
            stops=(),
            **more,
        )
    return str(caught.value)


CASES = {
    "NaN in a layer": (UP, float("nan"), 5),
    "infinity in a layer": (UP, float("inf"), 5),
    "-infinity in the head": ("lm_head.weight", float("-inf"), 0),
    "NaN in a norm": ("model.norm.weight", float("nan"), 3),
    "NaN in keys": ("model.layers.0.self_attn.k_proj.weight", float("nan"), 0),
    "NaN in the embedding of a token of the prompt": ("model.embed_tokens.weight", float("nan"), 3 * 32),
}


@pytest.mark.parametrize("made", [None, "on one device", "on a mesh"])
@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_is_not_finite_is_named(weights, name, made):
    """By its name in the checkpoint, joined with others too."""
    key, value, at = CASES[name]
    mesh = make_mesh(MeshConfig(model=2), jax.devices()[:2]) if made == "on a mesh" else None
    decoder = spoilt(weights, key, value, at).decoder("unrolled" if mesh is None else "stacked", mesh=mesh)
    message = said(prompted(decoder if made is None else fuse(decoder), [PROMPT]))
    assert (
        message == f"the target's logits are NaN or infinite, which gives no answer: {key} holds NaN or infinite values"
    )


@pytest.mark.parametrize("lookup", ["off", "on"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_drafters_are_looked_at_too(weights, temperature, lookup):
    decoder = spoilt(weights, UP, float("nan")).decoder()
    message = said(
        prompted(weights.decoder(), [PROMPT]),
        prompted(decoder, [PROMPT]),
        temperature=temperature,
        lookup=lookup,
        texts=[PROMPT * 2],
    )
    assert message.startswith("the drafter's logits") and UP in message


def test_a_quantised_copy_is_looked_at_too(weights):
    copy = quantize(spoilt(weights, UP, float("inf")).decoder(), 8)
    message = said(prompted(weights.decoder(), [PROMPT]), prompted(copy, [PROMPT]))
    assert message.startswith("the drafter's") and f"{UP} holds" in message


def test_what_overflows_from_finite_weights(weights):
    """Rope of no angle, a norm whose mean of squares overflows, scores that do."""
    rope = Weights(replace(weights.config, rope=Rope(10000.0, "linear", float("nan"))), weights.arrays)
    assert "angles" in said(prompted(rope.decoder(), [PROMPT]))
    large = Weights(weights.config, {**weights.arrays, UP: weights.arrays[UP] * np.float32(1e30)})
    assert said(prompted(large.decoder(), [PROMPT])).endswith(
        "every weight is finite, so activations overflow in float32"
    )
    embedding = "model.embed_tokens.weight"
    large = Weights(weights.config, {**weights.arrays, embedding: weights.arrays[embedding] * np.float32(1e25)})
    assert said(prompted(large.decoder(), [PROMPT])).endswith("overflow in float32")


@pytest.mark.parametrize("eight_bits", [False, True])
def test_keys_and_values_that_are_not_finite(weights, eight_bits):
    target = prompted(weights.decoder(), [PROMPT])
    layers = jax.tree.map(lambda array: array.at[0, 0, 2, 1].set(np.nan), target.prefix.layers)
    prefix = replace(target.prefix, layers=layers)
    assert "the target's logits" in said(replace(target, prefix=quantize_kv(prefix) if eight_bits else prefix))


def test_a_row_that_no_token_has_may_hold_anything(weights):
    """Rows of padding are looked at by nobody."""
    padded = weights.padded(VOCABULARY + 4, np.full(weights.config.hidden_size, np.nan))
    got, want = (
        generate(
            prompted(each.decoder(), [PROMPT]),
            None,
            speculation=SpeculationConfig(mode="target", lookup="off"),
            sampling=SamplingConfig(temperature=0, max_new_tokens=8),
            stops=(),
            token_ids=range(VOCABULARY),
        )
        for each in (padded, weights)
    )
    assert got.tokens == want.tokens


def test_the_first_layer_is_named_in_the_stacked_layout(weights):
    both = spoilt(spoilt(weights, UP, math.nan), "model.layers.0.self_attn.o_proj.weight", math.nan)
    assert why_not_finite(both.decoder("stacked")).startswith("model.layers.0.self_attn.o_proj.weight holds")
