# SPDX-License-Identifier: Apache-2.0
"""What is stored of layers with a window is found again on another mesh and with other room, whatever is kept there."""

from pathlib import Path

import numpy as np
import pytest

from rapid_jax.engine.host_prefixes import device_bytes, head_bytes
from rapid_jax.model.decoder import Decoder
from rapid_jax.speculative import prefix_arrays, window_layout
from rapid_jax.speculative.extend import extend
from rapid_jax.speculative.prefill import Prefill, PrefillSettings, new_tail, windows_of
from rapid_jax.speculative.prefix_heads import Place
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.speculative.test_prefill import prompts_of, rows_of
from tests.speculative.test_windowed import FLOAT32, UNIT, in_one_pass, mesh_named, weights_of

WINDOW, CHUNK, SUFFIX = 21, 8, 11
WEIGHTS = weights_of("mixed", WINDOW)


@pytest.fixture(autouse=True)
def small_unit(monkeypatch):
    monkeypatch.setattr(window_layout, "_UNIT", UNIT)


def place_of(decoder: Decoder, tokens: int, room: int) -> Place:
    devices = 1 if decoder.mesh is None else decoder.mesh.shape["context"]
    return Place.of(tokens, max(tokens, room), CHUNK, devices, *windows_of(decoder.config))


def stored(folder: Path, head: list[int], mesh: str | None, room: int) -> int:
    """Keeps the head under "ab"; how many tokens its window has."""
    on = mesh_named(mesh)
    work = Prefill(WEIGHTS.decoder("stacked", mesh=on), [head], PrefillSettings(CHUNK, room=room), dtype=FLOAT32)
    while work.left:
        work.step()
    made = work.prefix
    PrefixStore(folder, 1 << 30, mesh=on, kv_heads=2).save("ab", made)
    assert made.near is not None
    return int(made.near.prefix.used)


@pytest.mark.parametrize(
    ("tokens", "written", "wrote", "read", "reads"),
    [
        (30, None, 20, "context=4", 30),  # one device keeps the window, four have slots for all of it
        (30, "context=4", 30, None, 20),
        (22, None, 22, "room", 20),  # the same device, with room for a longer document
        (22, "room", 20, None, 22),
        (14, None, 14, "context=4", 14),  # all of it is seen
    ],
)
def test_a_prefix_comes_back_where_more_or_less_is_kept(tmp_path, caplog, tokens, written, wrote, read, reads):
    prompt = prompts_of(tokens + SUFFIX)[0]
    head, suffix = prompt[:tokens], prompt[tokens:]
    ours, theirs = (None if each == "room" else each for each in (written, read))
    assert stored(tmp_path, head, ours, 100 * (written == "room")) == wrote
    on = mesh_named(theirs)
    decoder, store = WEIGHTS.decoder(mesh=on), PrefixStore(tmp_path, 1 << 30, mesh=on, kv_heads=2)
    place = place_of(decoder, tokens, 100 * (read == "room"))
    assert place.near is not None and place.near.tokens == reads
    for again in (False, True):
        prefix = store.load("ab", layout="unrolled", place=place)
        assert prefix is not None and not caplog.text and device_bytes(prefix) == head_bytes(decoder, place)
        tail = new_tail(decoder, [tokens], 16, FLOAT32)
        tail = extend(decoder, prefix, tail, [suffix], width=4, block_size=16)
        got, expected = rows_of(tail.layers, 0, slice(0, SUFFIX)), in_one_pass(WEIGHTS, prompt)[..., -SUFFIX:, :]
        np.testing.assert_allclose(got, expected, atol=3e-5)
        if not again:  # what came back is stored as what was made
            store.remove("ab")
            store.save("ab", prefix)


def test_the_head_of_a_longer_one_is_refused(tmp_path):
    """Its window would be another's."""
    prompt = prompts_of(70)[0]
    stored(tmp_path, prompt, None, 0)
    decoder = WEIGHTS.decoder()
    with pytest.raises(ValueError, match="expected all 70 tokens"):
        PrefixStore(tmp_path, 1 << 30).load("ab", layout="unrolled", place=place_of(decoder, 48, 0))


def test_storing_runs_no_program_on_several_devices(tmp_path, monkeypatch):
    seen, shifted = [], prefix_arrays._shift
    monkeypatch.setattr(
        prefix_arrays, "_shift", lambda x, first: seen.append(x.sharding.device_set) or shifted(x, first)
    )
    stored(tmp_path, prompts_of(70)[0], "context=4", 0)
    assert seen and all(len(devices) == 1 for devices in seen)
