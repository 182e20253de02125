# SPDX-License-Identifier: Apache-2.0
"""Layers with a window keep their window: what is said after a prompt is what a forward pass without a cache says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.strategy import Strategy
from rapid_jax.engine.host_prefixes import HostMoves, device_bytes, head_bytes
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.layer_kinds import LayerKind
from rapid_jax.runtime.array_store import Damaged
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative import window_layout
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.extend import extend
from rapid_jax.speculative.generate import generate
from rapid_jax.speculative.prefill import Prefill, PrefillSettings, new_tail, prefill, windows_of
from rapid_jax.speculative.prefix_check import check_entry
from rapid_jax.speculative.prefix_heads import Place
from rapid_jax.speculative.prefix_store import PrefixStore
from rapid_jax.speculative.rows import with_room, with_same_slots, written
from rapid_jax.speculative.window_layout import WindowLayout
from tests.compiled import compiled
from tests.reference import greedy
from tests.speculative.models import PADDED, Weights, next_logits, prompted
from tests.speculative.test_prefill import prompts_of, rows_of

VOCABULARY, CHUNK, UNIT = 16, 16, 8
FLOAT32 = jnp.dtype(jnp.float32)
PATTERNS = {
    "all": lambda window: (LayerKind(window=window),) * 4,
    "mixed": lambda window: (LayerKind(window=window),) * 2 + (LayerKind(), LayerKind(window=window)),
}


@pytest.fixture(autouse=True)
def small_unit(monkeypatch):
    """So that a few slots are a window's, where kernels for TPUs want 128."""
    monkeypatch.setattr(window_layout, "_UNIT", UNIT)


def weights_of(pattern: str, window: int) -> Weights:
    return Weights.lively(VOCABULARY, pattern=PATTERNS[pattern](window))


def mesh_named(axes: str | None):
    sizes = MeshConfig.named(axes) if axes else MeshConfig()
    return make_mesh(sizes, jax.devices()[: sizes.devices]) if axes else None


@jax.jit
def _all_keys_and_values(decoder: Decoder, tokens_BT):
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    plain = attend_self(pos_BT, Strategy(block=64))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, **window):
        return plain(q_BTNH, k_BTKH, v_BTKH, layer, **window)[0], (k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))

    return decoder.hidden(tokens_BT, pos_BT, attend)[1]


def in_one_pass(weights: Weights, prompt: list[int]) -> np.ndarray:
    """[layer, keys or values, K, T, H] of a whole prompt, by one forward pass without a cache."""
    tokens = np.zeros((1, PADDED), np.int32)
    tokens[0, : len(prompt)] = prompt
    kept = _all_keys_and_values(weights.decoder(), jnp.asarray(tokens))
    return np.stack([np.stack([np.asarray(x)[0, :, : len(prompt)] for x in layer]) for layer in kept])


def windowed_part(prefix: Prefix) -> Prefix:
    assert prefix.near is not None
    return prefix.near.prefix


@pytest.mark.parametrize(
    ("window", "lengths"),
    [
        (1, (70, 33)),
        (5, (70, 33)),  # shorter than a chunk; rows end in different chunks
        (17, (70, 64)),  # as long as a chunk reaches back
        (40, (90, 41)),  # several chunks
        (40, (49, 12)),  # prompts about as long as the window, and shorter
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("pattern", "layout", "mesh"),
    [
        ("mixed", "unrolled", None),
        ("mixed", "stacked", None),
        ("all", "unrolled", None),
        ("all", "stacked", None),
        ("mixed", "unrolled", "context=2"),
        ("mixed", "stacked", "context=4"),
        ("all", "stacked", "context=2,model=2"),
    ],
)
def test_further_tokens_are_one_pass(pattern, layout, mesh, window, lengths):
    weights = weights_of(pattern, window)
    decoder = weights.decoder(layout, mesh=mesh_named(mesh))
    prompts = prompts_of(*lengths)
    suffix = 11
    heads = [prompt[:-suffix] for prompt in prompts]
    prefix = prefill(decoder, heads, chunk=CHUNK, dtype=FLOAT32)
    check_slots(prefix, decoder, window, [len(head) for head in heads])
    tail = new_tail(decoder, [len(head) for head in heads], 16, FLOAT32)
    tail = extend(decoder, prefix, tail, [prompt[-suffix:] for prompt in prompts], width=4, block_size=16)
    for row, prompt in enumerate(prompts):
        got = rows_of(tail.layers, row, slice(0, suffix))
        np.testing.assert_allclose(got, in_one_pass(weights, prompt)[..., -suffix:, :], atol=3e-5)


def check_slots(prefix: Prefix, decoder: Decoder, window: int, lengths: list[int]) -> None:
    """Each row's last tokens that a later one sees, once each, in as few slots as are said."""
    near, devices = windowed_part(prefix), 1 if decoder.mesh is None else decoder.mesh.shape["context"]
    unit = UNIT * devices
    assert near.slots == min(-(-max(window - 1, 1) // unit) * unit, prefix.slots)
    for leaf in jax.tree.leaves(near.layers):
        assert leaf.shape[-2] == near.slots
    for row, length in enumerate(lengths):
        first = 0 if near.slots == prefix.slots else max(length - max(window - 1, 1), 0)
        pos = np.asarray(near.pos_BS[row])
        assert sorted(pos[pos >= 0]) == list(range(first, length))
    assert all(leaf.shape[-2] == prefix.slots for leaf in jax.tree.leaves(prefix.layers))


GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)
PROMPTS = prompts_of(71, 38)


def spoken(decoder: Decoder, drafter: Decoder, *, int8: bool = False) -> list[list[int]]:
    """Greedy answers, drafted and copied by a drafter with windows too."""
    target, drafts = prompted(decoder, PROMPTS, int8=int8), prompted(drafter, prompts_of(44, 30))
    speculation = SpeculationConfig(mode="lossless", gamma=3, lookup="on")
    return generate(target, drafts, speculation=speculation, sampling=GREEDY, stops=(), texts=PROMPTS).tokens


@pytest.mark.parametrize("window", [5, 40])
@pytest.mark.parametrize(
    ("pattern", "layout", "mesh"),
    [
        ("mixed", "unrolled", None),
        ("mixed", "stacked", None),
        ("all", "stacked", None),
        ("mixed", "stacked", "context=2"),
    ],
)
def test_answers_are_those_of_whole_sequences(pattern, layout, mesh, window):
    weights, mesh = weights_of(pattern, window), mesh_named(mesh)
    got = spoken(weights.decoder(layout, mesh=mesh), weights.perturbed(0.1).decoder(layout, mesh=mesh))
    plain = next_logits(weights.decoder())
    assert got == [greedy(plain, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_stacks_as_on_tpus(from_stacks, pattern):
    weights = weights_of(pattern, 5)
    got = spoken(weights.decoder("stacked"), weights.perturbed(0.1).decoder("stacked"))
    plain = next_logits(weights.decoder())
    assert got == [greedy(plain, prompt, 20) for prompt in PROMPTS] and from_stacks


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_quantised_prefixes_are_so_in_every_layer(layout, monkeypatch):
    """And say what those say whose windows keep everything."""
    weights = weights_of("mixed", 5)
    decoder, drafter = weights.decoder(layout), weights.perturbed(0.1).decoder(layout)
    made = prompted(decoder, PROMPTS, int8=True).prefix
    assert {leaf.dtype for group in made.groups for leaf in jax.tree.leaves(group.layers)} == {
        jnp.dtype("int8"),
        jnp.dtype("float32"),
    }
    got = spoken(decoder, drafter, int8=True)
    monkeypatch.setattr(WindowLayout, "kept", property(lambda self: self.chunks))
    assert got == spoken(decoder, drafter, int8=True)


def check_equal(got: Prefix | None, expected: Prefix) -> None:
    assert got is not None and jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(got.groups, expected.groups, strict=True):
        np.testing.assert_array_equal(one.pos_BS, other.pos_BS)
        assert int(one.used) == int(other.used)
        filled = np.asarray(one.pos_BS)[0] >= 0
        for a, b in zip(jax.tree.leaves(one.layers), jax.tree.leaves(other.layers), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[..., filled, :], np.asarray(b)[..., filled, :])


@pytest.mark.parametrize("written", ["unrolled", "stacked"])
@pytest.mark.parametrize(("mesh", "read"), [(None, "unrolled"), (None, "stacked"), ("context=4", "stacked")])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stored_prefix_comes_back(tmp_path, pattern, written, mesh, read):
    weights, prompt, chunk = weights_of(pattern, 21), PROMPTS[0], 16
    store = PrefixStore(tmp_path, 1 << 30)
    store.save("ab", prefill(weights.decoder(written), [prompt], chunk=chunk, dtype=FLOAT32), ["mark"])
    on, window = mesh_named(mesh), (21, (0, 1, 2, 3) if pattern == "all" else (0, 1, 3))
    place = Place.of(len(prompt), len(prompt), chunk, 1 if on is None else 4, *window)
    got = PrefixStore(tmp_path, 1 << 30, mesh=on, kv_heads=2).load("ab", layout=read, place=place)
    expected = prefill(weights.decoder(read, mesh=on), [prompt], chunk=chunk, dtype=FLOAT32)
    assert got is not None
    for one, other in zip(got.groups, expected.groups, strict=True):
        np.testing.assert_array_equal(one.pos_BS, other.pos_BS)
        filled = np.asarray(one.pos_BS)[0] >= 0
        for a, b in zip(jax.tree.leaves(one.layers), jax.tree.leaves(other.layers), strict=True):
            np.testing.assert_allclose(np.asarray(a)[..., filled, :], np.asarray(b)[..., filled, :], atol=2e-5)
    check_entry(tmp_path / "ab")


@pytest.mark.parametrize("name", ["k_BKSH", "near_v_BKSH", "near_sums_BKS"])
def test_a_flipped_bit_of_a_stored_prefix_is_found(tmp_path, name, caplog):
    weights, prompt = weights_of("mixed", 21), PROMPTS[0]
    store = PrefixStore(tmp_path, 1 << 30)
    store.save("ab", prefill(weights.decoder(), [prompt], chunk=16, dtype=FLOAT32))
    piece = next(path for path in (tmp_path / "ab").rglob("*") if f"/{name}/c/" in path.as_posix() and path.is_file())
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    with pytest.raises(Damaged):
        check_entry(tmp_path / "ab")
    place = Place.of(len(prompt), len(prompt), 16, 1, 21, (0, 1, 3))
    assert store.load("ab", layout="unrolled", place=place) is None and "unusable" in caplog.text


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_bytes_are_reckoned_as_they_are_and_moves_keep_them(layout):
    decoder = weights_of("mixed", 21).decoder(layout)
    made = prefill(decoder, [PROMPTS[0]], chunk=16, dtype=FLOAT32)
    place = Place.of(len(PROMPTS[0]), len(PROMPTS[0]), 16, 1, *windows_of(decoder.config))
    assert device_bytes(made) == head_bytes(decoder, place)
    beside = head_bytes(decoder, place, filling=True) - device_bytes(made)  # two chunks of 16 in three layers
    assert beside == 3 * 2 * 32 * 2 * 8 * 4
    everything = device_bytes(prefill(full_decoder(layout), [PROMPTS[0]], chunk=16, dtype=FLOAT32))
    assert device_bytes(made) < 0.6 * everything
    moves = HostMoves(decoder)
    check_equal(moves.to_devices(moves.to_host(made)), made)


def full_decoder(layout) -> Decoder:
    return Weights.lively(VOCABULARY, pattern=(LayerKind(),) * 4).decoder(layout)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_rows_of_documents_of_other_lengths_join(layout):
    """One shorter than the window's slots beside one that is longer."""
    decoder = weights_of("mixed", 41).decoder(layout)
    parts = [{"prefix": prefill(decoder, [prompts_of(length)[0]], chunk=16, dtype=FLOAT32)} for length in (20, 75)]
    first, second = with_same_slots(*parts, 1)
    both = written(with_room(first, second, 2), second, np.int32(1))["prefix"]
    for row, part in enumerate((first, second)):
        for one, other in zip(both.groups, part["prefix"].groups, strict=True):
            np.testing.assert_array_equal(np.asarray(one.pos_BS)[row], np.asarray(other.pos_BS)[0])
            axis = int(layout == "stacked")
            for a, b in zip(jax.tree.leaves(one.layers), jax.tree.leaves(other.layers), strict=True):
                np.testing.assert_array_equal(np.take(np.asarray(a), row, axis), np.take(np.asarray(b), 0, axis))


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_the_first_chunk_runs_all_programs(layout):
    """What warm-ups rely on: of scores, and of pairs."""
    decoder = weights_of("mixed", 21).decoder(layout)
    jax.clear_caches()  # of this process: programs of the same shapes would not be compiled
    work = Prefill(decoder, prompts_of(90, 41), PrefillSettings(CHUNK), dtype=FLOAT32)
    work.step()
    with compiled() as found:
        while work.left:
            work.step()
    assert found == []
