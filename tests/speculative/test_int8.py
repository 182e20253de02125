# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8 bits, drafted for by weights in 8 bits: every mesh and layout gives the tokens of one device."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rapid_jax.model.fused import quantize
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import generate
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.speculative.conftest import LIMIT
from tests.speculative.models import place_of, prompted
from tests.speculative.test_sharded import decoder_on

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=LIMIT)
LOSSLESS = SpeculationConfig(mode="lossless", gamma=3, lookup="off")
PLAIN = SpeculationConfig(mode="target", gamma=0, lookup="off")
COPIED = MeshConfig(context=2, model=4, replicate_kv=True)
PLACES = {
    "one device, stacked": (MeshConfig(), "stacked"),
    "model 2": (MeshConfig(model=2), "unrolled"),
    "data 2, context 2, model 2, stacked": (MeshConfig(data=2, context=2, model=2), "stacked"),
    "context 2, model 4, kv heads copied": (COPIED, "unrolled"),
}


@pytest.fixture(scope="module")
def on_one_device(questions, answer):
    """(plain decoding, drafts by 8 bits), both over 8 bits."""
    target = decoder_on(questions.weights, MeshConfig())
    plain = answer(PLAIN, GREEDY, rows=[0, 1], target=target, int8=True)
    drafted = answer(LOSSLESS, GREEDY, rows=[0, 1], target=target, drafter=quantize(target, 8), int8=True)
    return plain, drafted


def test_drafts_change_no_token(on_one_device):
    plain, drafted = on_one_device
    assert drafted.tokens == plain.tokens
    assert 0 < sum(drafted.accepted) < sum(drafted.drafted)


@pytest.mark.parametrize("place", PLACES)
def test_every_mesh_and_layout_gives_the_tokens_of_one_device(questions, answer, on_one_device, place):
    config, layout = PLACES[place]
    target = decoder_on(questions.weights, config, layout)
    got = answer(LOSSLESS, GREEDY, rows=[0, 1], target=target, drafter=quantize(target, 8), int8=True)
    want = on_one_device[1]
    assert got.tokens == want.tokens
    assert (got.drafted, got.accepted, got.rounds) == (want.drafted, want.accepted, want.rounds)


def test_a_drafter_on_devices_of_its_own(questions, answer, on_one_device):
    here, there = make_meshes(MeshConfig(context=2), MeshConfig(context=2, model=2))
    target = decoder_on(questions.weights, MeshConfig(), mesh=here)
    drafter = quantize(decoder_on(questions.weights, MeshConfig(), mesh=there), 8)
    got = answer(LOSSLESS, GREEDY, rows=[0, 1], target=target, drafter=drafter, int8=True)
    want = on_one_device[1]
    assert got.tokens == want.tokens and (got.drafted, got.accepted) == (want.drafted, want.accepted)


def test_a_stored_prefix_is_read_onto_another_mesh(questions, on_one_device, tmp_path: Path):
    """Written by context 2, model 4 with copied kv heads, which are stored once; read by others."""
    layout = "stacked"  # in full both are stored and read: test_sharded.py
    writer = decoder_on(questions.weights, COPIED, layout)
    made = prompted(writer, questions.prompts[:1], int8=True)
    PrefixStore(tmp_path, 1 << 30, mesh=writer.mesh, kv_heads=2, quiet=True).save("0" * 64, made.prefix)
    for config in (MeshConfig(), MeshConfig(context=2, model=2), COPIED):
        decoder = decoder_on(questions.weights, config, layout)
        store = PrefixStore(tmp_path, 1 << 30, mesh=decoder.mesh, kv_heads=2, quiet=True)
        prefix = store.load("0" * 64, layout=layout, place=place_of(decoder, questions.prompts[0]))
        assert prefix is not None
        assert {x.dtype.name for x in jax.tree.leaves(prefix.layers)} == {"int8", "float32"}
        side = replace(made, decoder=decoder, prefix=prefix)
        got = generate(side, None, speculation=PLAIN, sampling=GREEDY, stops=(questions.stop,))
        assert got.tokens == on_one_device[0].tokens[:1]
        if config == COPIED:
            for one, other in zip(jax.tree.leaves(prefix.layers), jax.tree.leaves(made.prefix.layers), strict=True):
                assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
