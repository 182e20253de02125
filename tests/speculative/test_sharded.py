# SPDX-License-Identifier: Apache-2.0
"""RAPID on meshes of fake devices: the tokens are those of one device, greedy and sampled, together and apart."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.model.fused import fuse, quantize
from rapid_jax.runtime.axes import PARAM, with_copied_kv
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.prefill import prefill
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.speculative.conftest import LIMIT, VOCABULARY
from tests.speculative.models import Weights, place_of, prompted

SPECULATIONS = {
    "greedy": (
        SpeculationConfig(eta=3.0, gamma=3, lookup="off"),
        SamplingConfig(temperature=0.0, max_new_tokens=LIMIT),
    ),
    "sampled": (
        SpeculationConfig(eta=3.0, gamma=3, lookup="on"),
        SamplingConfig(temperature=0.8, top_p=0.95, repetition_penalty=1.2, max_new_tokens=LIMIT, seed=5),
    ),
}
MESHES = {
    "context 8": MeshConfig(context=8),
    "context 4, model 2": MeshConfig(context=4, model=2),
    "fsdp 2, context 2, model 2": MeshConfig(fsdp=2, context=2, model=2),
    "model 4, kv heads copied": MeshConfig(context=2, model=4, replicate_kv=True),
}


def decoder_on(weights: Weights, config: MeshConfig, layout="unrolled", mesh=None):
    mesh = make_meshes(config, None)[0] if mesh is None else mesh
    table = with_copied_kv(PARAM, config.replicate_kv)
    return fuse(weights.decoder(layout, mesh=mesh, table=table), spent=True)


@pytest.fixture(scope="module")
def drafter_weights(questions) -> Weights:
    return questions.weights.perturbed(0.1)


@pytest.fixture(scope="module")
def on_one_device(answer):
    return {name: answer(*settings, rows=[0]) for name, settings in SPECULATIONS.items()}


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("context 8", "greedy"),
        ("context 4, model 2", "sampled"),
        ("fsdp 2, context 2, model 2", "sampled"),
        ("model 4, kv heads copied", "greedy"),
    ],
)
def test_every_mesh_gives_the_tokens_of_one_device(questions, drafter_weights, answer, on_one_device, mesh, settings):
    config = MESHES[mesh]
    layout = "stacked" if config.fsdp > 1 else "unrolled"
    target = decoder_on(questions.weights, config, layout)
    drafter = decoder_on(drafter_weights, config, layout, mesh=target.mesh)
    got, want = answer(*SPECULATIONS[settings], rows=[0], target=target, drafter=drafter), on_one_device[settings]
    assert got.tokens == want.tokens and got.origins == want.origins
    assert (got.drafted, got.accepted, got.rounds) == (want.drafted, want.accepted, want.rounds)
    assert sum(want.accepted) > 0 and len(set(want.tokens[0])) > 4


def test_layers_that_are_read_from_stacks(questions, drafter_weights, answer, from_stacks):
    """As on TPUs: new tokens are kept apart, and each device is told how much it has used of a prefix."""
    config = MESHES["context 4, model 2"]
    target = decoder_on(questions.weights, config, "stacked")
    drafter = decoder_on(drafter_weights, config, "stacked", mesh=target.mesh)
    lossless = SpeculationConfig(mode="lossless", gamma=3, lookup="off")
    got = answer(lossless, SPECULATIONS["greedy"][1], rows=[0, 1], target=target, drafter=drafter)
    assert got.tokens == questions.until_stop()[:2] and from_stacks


def test_a_drafter_in_8_bits_drafts_alike_on_every_mesh(questions, answer):
    """The target's own copy, of the same 8 bits however they are split; greedy answers are plain ones."""
    speculation, sampling = SpeculationConfig(mode="lossless", gamma=3, lookup="off"), SPECULATIONS["greedy"][1]
    found = []
    for config, layout in (
        (MeshConfig(), "unrolled"),
        (MeshConfig(model=2), "stacked"),
        (MESHES["model 4, kv heads copied"], "unrolled"),
    ):
        target = decoder_on(questions.weights, config, layout)
        found.append(answer(speculation, sampling, rows=[0, 1], target=target, drafter=quantize(target, 8)))
    assert [one.tokens for one in found] == [questions.until_stop()[:2]] * 3
    assert found[0].accepted == found[1].accepted == found[2].accepted and found[0].drafted == found[1].drafted
    assert 0 < sum(found[0].accepted) < sum(found[0].drafted)


def test_a_drafter_that_lacks_tokens_is_none_that_fails(questions, answer):
    """What it has beyond its vocabulary, to fill its devices' tiles, is no fault of it."""
    short = Weights.lively(VOCABULARY - 8, seed=7)
    speculation, sampling = SpeculationConfig(mode="lossless", gamma=2, lookup="off"), SPECULATIONS["greedy"][1]
    for config in (MeshConfig(), MeshConfig(model=2)):
        target = decoder_on(questions.weights, config)
        drafter = decoder_on(short, config, mesh=target.mesh)
        got = answer(speculation, sampling, rows=[0], target=target, drafter=drafter, token_ids=range(VOCABULARY))
        assert got.tokens == questions.until_stop()[:1]


@pytest.mark.parametrize("settings", SPECULATIONS)
def test_a_drafter_on_devices_of_its_own(questions, drafter_weights, answer, on_one_device, settings):
    here, there = make_meshes(MeshConfig(context=2), MeshConfig(context=2, model=2))
    assert here is not None and there is not None and not set(here.devices.flat) & set(there.devices.flat)
    target = decoder_on(questions.weights, MeshConfig(), mesh=here)
    drafter = decoder_on(drafter_weights, MeshConfig(), mesh=there)
    got, want = answer(*SPECULATIONS[settings], rows=[0], target=target, drafter=drafter), on_one_device[settings]
    assert got.tokens == want.tokens and got.origins == want.origins
    assert (got.drafted, got.accepted, got.draft_steps) == (want.drafted, want.accepted, want.draft_steps)
    assert got.target_steps == want.target_steps


def test_an_interrupted_row_stays_so_when_another_program_is_compiled(questions, drafter_weights, answer):
    """gamma auto runs several programs; apart, each is compiled by a round in which every row is said to be done."""
    here, there = make_meshes(MeshConfig(context=2), MeshConfig(context=2))
    target = decoder_on(questions.weights, MeshConfig(), mesh=here)
    drafter = decoder_on(drafter_weights, MeshConfig(), mesh=there)
    told: list[int] = []

    def stop_the_first(row: int, tokens: list[int], origins: list[int]) -> bool:
        told.extend([row] * len(tokens))
        return row == 0 and told.count(0) >= 2

    speculation = SpeculationConfig(mode="lossless", gamma="auto", lookup="off", rounds_per_read=1)
    sampling = SPECULATIONS["greedy"][1]
    got = answer(speculation, sampling, rows=[0, 1], target=target, drafter=drafter, stops=(), on_tokens=stop_the_first)
    assert got.finish_reasons == ["interrupted", "length"]
    assert len(got.tokens[0]) < LIMIT == len(got.tokens[1]) and len(got.gammas) > 1


def test_a_batch_split_over_data(questions, drafter_weights, answer):
    speculation, sampling = SPECULATIONS["sampled"]
    seeds = [3, 4, 5, 6]
    mesh = MeshConfig(data=2, context=2, model=2)
    target = decoder_on(questions.weights, mesh)
    drafter = decoder_on(drafter_weights, mesh, mesh=target.mesh)
    rows = {"rows": [0, 1, 2, 0], "seeds": seeds}
    want = answer(speculation, sampling, **rows)
    got = answer(speculation, sampling, target=target, drafter=drafter, **rows)
    assert got.tokens == want.tokens and got.accepted == want.accepted


def test_gamma_auto_on_a_mesh_is_greedy_decoding(questions, answer):
    target = decoder_on(questions.weights, MeshConfig(context=4))
    speculation = SpeculationConfig(mode="lossless", gamma="auto", lookup="auto")
    got = answer(speculation, SPECULATIONS["greedy"][1], rows=[1], target=target, drafter=target)
    assert got.tokens == questions.until_stop()[1:2]


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_a_stored_prefix_is_read_onto_another_mesh(questions, answer, tmp_path: Path, layout):
    """Written by context 4 x model 2; read by one device, by context 8 and by model 4 with copied kv heads."""
    weights, prompt = questions.weights, questions.prompts[0]
    made = prompted(decoder_on(weights, MESHES["context 4, model 2"], layout), [prompt])
    PrefixStore(tmp_path, 1 << 30, mesh=made.decoder.mesh, kv_heads=2, quiet=True).save("0" * 64, made.prefix)
    speculation, sampling = SpeculationConfig(mode="target", lookup="off", gamma=0), SPECULATIONS["greedy"][1]
    from rapid_jax.speculative.generate import generate

    readers = [weights.decoder(layout)]
    readers += [decoder_on(weights, MESHES[name], layout) for name in ("context 8", "model 4, kv heads copied")]
    for decoder in readers:
        store = PrefixStore(tmp_path, 1 << 30, mesh=decoder.mesh, kv_heads=2, quiet=True)
        prefix = store.load("0" * 64, layout=layout, place=place_of(decoder, prompt))
        assert prefix is not None
        side = replace(made, decoder=decoder, prefix=prefix)
        got = generate(side, None, speculation=speculation, sampling=sampling, stops=(questions.stop,))
        assert got.tokens == questions.until_stop()[:1]
        if decoder.mesh is None:
            plain = prefill(decoder, [prompt[:-2]], chunk=16, dtype=jnp.float32)
            np.testing.assert_array_equal(prefix.pos_BS, plain.pos_BS)


def test_weights_go_straight_into_their_shards(questions):
    mesh = make_meshes(MESHES["fsdp 2, context 2, model 2"], None)[0]
    decoder = questions.weights.decoder(mesh=mesh)
    gate = decoder.blocks[0].gate_DF[...]
    assert gate.sharding.shard_shape(gate.shape) == (gate.shape[0] // 2, gate.shape[1] // 2)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(decoder) for shard in leaf.addressable_shards[:1])
    assert held < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))


def test_what_does_not_divide_is_said_before_anything_is_read(questions):
    read = []
    weights = replace(questions.weights, arrays=type("Arrays", (dict,), {"__getitem__": lambda s, k: read.append(k)})())
    with pytest.raises(InputError, match="axis K of size 2 cannot be split over model = 4"):
        decoder_on(weights, MeshConfig(model=4))
    with pytest.raises(InputError, match="2 kv heads cannot be shared out over model = 5"):
        decoder_on(weights, MeshConfig(model=5))
    with pytest.raises(InputError, match="D of size 32 cannot be split over fsdp = 5"):
        decoder_on(weights, MeshConfig(fsdp=5))
    assert read == []
    decoder = decoder_on(questions.weights, MeshConfig(context=8))
    with pytest.raises(InputError, match=r"multiple of 16 \(2 x context 8\), got 24"):
        prefill(decoder, [[1] * 64], chunk=24, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (MeshConfig(context=16), None, "mesh data 1 x fsdp 1 x context 16 x model 1: expected 16 devices, got 8"),
        (MeshConfig(context=4), MeshConfig(model=8), "and drafter_mesh .* model 8: expected 12 devices, got 8"),
    ],
)
def test_too_few_devices_are_named_with_both_numbers(first, second, message):
    with pytest.raises(InputError, match=message):
        make_meshes(first, second)


def test_the_vocabulary_of_the_tests_divides_their_meshes():
    assert all(VOCABULARY % config.model == 0 for config in MESHES.values())
