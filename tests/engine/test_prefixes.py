# SPDX-License-Identifier: Apache-2.0
"""Keys and values in three tiers: what is found where, what goes first, what is shared with whom."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.engine.prefixes import PrefixCache
from rapid_jax.runtime.compiling import timed
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.prefill import prefill
from tests.engine.prefix_cases import (
    CHUNK,
    LENGTH,
    MESHES,
    cache_of,
    check_head,
    check_same,
    decoder_on,
    prefix_of,
    tokens,
)


def full(cache: PrefixCache, decoder, *seeds: int) -> list:
    return [cache.put(cache.name(head := tokens(LENGTH, seed)), prefix_of(decoder, head)) for seed in seeds]


def tiers(cache: PrefixCache, *seeds: int) -> list[str | None]:
    return [cache.tier(cache.name(tokens(LENGTH, seed)).key) for seed in seeds]


def gib(size: float) -> float:
    return size / 2**30


def changed(head: list[int], at: int, length: int) -> list[int]:
    """A head that is another from token `at` on."""
    return [*head[:at], head[at] + 1, *tokens(length - at - 1, seed=99)]


def check_lies_as(head: Prefix, whole: Prefix, tokens: int) -> None:
    """The slots of the head are those that a prefill of the whole gives the same positions, and hold the same."""
    whole_S, head_S = np.asarray(whole.pos_BS)[0], np.asarray(head.pos_BS)[0]
    np.testing.assert_array_equal(head_S, np.where(whole_S < tokens, whole_S, -1))
    for one, other in zip(jax.tree.leaves(head.layers), jax.tree.leaves(whole.layers), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim) and one.shape == other.shape
        one_host, other_host = np.asarray(one)[..., head_S >= 0, :], np.asarray(other)[..., head_S >= 0, :]
        np.testing.assert_allclose(one_host, other_host, atol=1e-5)


def test_what_was_put_is_found_and_nothing_else(decoder, tmp_path: Path):
    cache, head = cache_of(decoder, tmp_path), tokens(LENGTH)
    assert cache.find(cache.name(head)).prefix is None
    prefix = prefix_of(decoder, head)
    handle = cache.put(cache.name(head), prefix)
    found = cache.find(cache.name(head))
    assert (found.prefix, found.tokens, found.handle, found.tier) == (prefix, LENGTH, handle, "device")
    assert cache.put(cache.name(head), prefix_of(decoder, head)) == handle, "what is there stays"
    assert cache.find(cache.name(tokens(LENGTH, seed=1))).tokens == 0
    with pytest.raises(ValueError, match="expected a prefix of one row, got 2"):
        cache.put(cache.name(head), replace(prefix, pos_BS=jnp.zeros((2, 8), jnp.int32)))


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("mesh", MESHES)
def test_bytes_are_known_before(tmp_path: Path, mesh, layout):
    decoder = decoder_on(MESHES[mesh], layout)
    cache = cache_of(decoder, tmp_path)
    for length in (1, LENGTH, 30 * CHUNK + 1):
        cache.put(cache.name(head := tokens(length)), prefix_of(decoder, head))
        assert cache.bytes()["device"] == cache.bytes_for(length)
        cache.remove(cache.name(head).key)


TIERS, LAYOUTS = ("device", "host", "disk"), ("unrolled", "stacked")


@pytest.mark.parametrize(
    ("mesh", "layout", "tier"),  # each pair of them
    [(mesh, LAYOUTS[(at + to) % 2], tier) for at, mesh in enumerate(MESHES) for to, tier in enumerate(TIERS)],
)
def test_a_common_head_is_copied_into_slots_for_the_whole(tmp_path: Path, mesh, layout, tier):
    decoder, kept = decoder_on(MESHES[mesh], layout), tokens(LENGTH)
    cache = cache_of(decoder, tmp_path, disk_gib=1.0 if tier == "disk" else 0.0)
    prefix = prefix_of(decoder, kept)
    cache.put(cache.name(kept), prefix)
    if tier == "host":
        assert cache.make_room(2**30)
    if tier == "disk":
        cache.save()
        cache = cache_of(decoder, tmp_path, disk_gib=1.0)
    assert cache.tier(cache.name(kept).key) == tier
    for common, length in ((3 * CHUNK + 7, 11 * CHUNK), (2 * CHUNK, 3 * CHUNK + 1)):
        head = changed(kept, common, length)
        found = cache.find(cache.name(head))
        usable = common // CHUNK * CHUNK
        assert (found.tokens, found.handle, found.tier) == (usable, None, tier)
        check_head(found.prefix, decoder, head[:usable], length)
    assert cache.find(cache.name(changed(kept, CHUNK - 1, LENGTH))).prefix is None
    again = cache.find(cache.name(kept))
    assert (again.tokens, again.tier) == (LENGTH, tier)
    if tier == "disk":
        check_head(again.prefix, decoder, kept, LENGTH)
    else:
        check_same(again.prefix, prefix)


def test_the_longest_head_counts_wherever_it_is(decoder, tmp_path: Path, caplog):
    stored, head = cache_of(decoder, tmp_path, disk_gib=1.0), tokens(LENGTH)
    short, long = changed(head, 2 * CHUNK, LENGTH), changed(head, 4 * CHUNK, LENGTH)
    stored.put(stored.name(long), prefix_of(decoder, long))
    stored.save()
    cache = cache_of(decoder, tmp_path, disk_gib=1.0)
    cache.put(cache.name(short), prefix_of(decoder, short))
    found = cache.find(cache.name(head))
    assert (found.tokens, found.tier) == (4 * CHUNK, "disk")
    check_head(found.prefix, decoder, head[: 4 * CHUNK], LENGTH)
    cache.put(cache.name(long), prefix_of(decoder, long))
    assert cache.find(cache.name(head)).tier == "device"
    cache.remove(cache.name(long).key)
    assert (cache.find(cache.name(head)).tokens, cache.find(cache.name(head)).tier) == (2 * CHUNK, "device")

    stored = cache_of(decoder, tmp_path, disk_gib=1.0)
    stored.put(stored.name(long), prefix_of(decoder, long))
    stored.save()
    data = next((tmp_path / "prefixes").rglob("c/0/0/0/0"))
    data.write_bytes(data.read_bytes()[:-1])
    found = cache.find(cache.name(head))
    assert (found.tokens, found.tier) == (2 * CHUNK, "device") and "computed again" in caplog.text
    check_head(found.prefix, decoder, head[: 2 * CHUNK], LENGTH)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_another_length_within_a_capacity_compiles_nothing(tmp_path: Path, layout, tier):
    decoder, kept = decoder_on(MESHES["context 2"], layout), tokens(LENGTH)
    cache = cache_of(decoder, tmp_path, disk_gib=1.0 if tier == "disk" else 0.0)
    cache.put(cache.name(kept), prefix_of(decoder, kept))
    if tier == "disk":
        cache.save()
        cache = cache_of(decoder, tmp_path, disk_gib=1.0)

    def find(common: int, length: int) -> None:
        if tier == "host":
            assert cache.make_room(2**30)
        assert cache.find(cache.name(changed(kept, common, length))).tokens == common // CHUNK * CHUNK

    with timed() as seconds:
        find(CHUNK, 10 * CHUNK)
        find(CHUNK, 80 * CHUNK)
    assert seconds.compiling > 0 or tier != "device", "a capacity that no test had before"
    with timed() as seconds:
        find(4 * CHUNK + 1, 9 * CHUNK + 5)
        find(2 * CHUNK + 9, 10 * CHUNK)
    assert seconds.compiling == 0


def test_a_head_that_a_longer_document_begins_with_is_whole(decoder, tmp_path: Path):
    cache, kept = cache_of(decoder, tmp_path), tokens(LENGTH)
    cache.put(cache.name(kept), prefix_of(decoder, kept))
    found = cache.find(cache.name(kept[: 4 * CHUNK]))
    assert found.tokens == 4 * CHUNK and found.handle is not None
    check_head(found.prefix, decoder, kept[: 4 * CHUNK], 4 * CHUNK)
    assert cache.find(cache.name(kept[: 4 * CHUNK])).handle == found.handle


@pytest.mark.parametrize("mesh", ["one device", "context 2"])
def test_an_answer_over_a_copied_head_is_that_of_a_prefill(tmp_path: Path, mesh):
    decoder, kept = decoder_on(MESHES[mesh]), tokens(LENGTH)
    cache = cache_of(decoder, tmp_path)
    cache.put(cache.name(kept), prefill(decoder, [kept], chunk=CHUNK, dtype=jnp.float32))
    prompt = changed(kept, 3 * CHUNK + 5, LENGTH)
    found = cache.find(cache.name(prompt[:-2]))
    assert found.tokens == 3 * CHUNK and found.prefix is not None
    whole = prefill(decoder, [prompt[:-2]], chunk=CHUNK, dtype=jnp.float32)
    check_lies_as(found.prefix, whole, found.tokens)
    settings = {
        "speculation": SpeculationConfig(mode="target", lookup="off", gamma=0),
        "sampling": SamplingConfig(temperature=0.0, max_new_tokens=12),
        "stops": (),
    }
    ways = ((found.prefix, found.tokens), (whole, LENGTH - 2))
    got, want = (generate(Prompted(decoder, [prompt], *way[:1], [way[1]]), None, **settings) for way in ways)
    assert got.tokens == want.tokens and len(set(want.tokens[0])) > 2


def test_the_least_recently_used_leaves_the_device_first_and_comes_back_bit_for_bit(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(2.5 * size))
    full(cache, decoder, 0, 1)
    cache.find(cache.name(tokens(LENGTH, 0)))
    full(cache, decoder, 2)
    assert tiers(cache, 0, 1, 2) == ["device", "host", "device"]
    assert cache.bytes() == {"device": 2 * size, "host": size, "disk": 0}
    assert cache.moves.gigabytes_per_second is None
    found = cache.find(cache.name(tokens(LENGTH, 1)))
    assert found.tier == "host"
    check_same(found.prefix, prefix_of(decoder, tokens(LENGTH, 1)))
    assert cache.moves.bytes == size and (cache.moves.gigabytes_per_second or 0) > 0
    assert tiers(cache, 0, 1, 2) == ["host", "device", "device"]
    assert cache.bytes() == {"device": 2 * size, "host": size, "disk": 0}


def test_what_is_held_stays_on_the_device(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(2.5 * size))
    first, second = full(cache, decoder, 0, 1)
    for handle in (first, second, second):
        cache.hold(handle)
    assert not cache.make_room(size)
    assert tiers(cache, 0, 1) == ["device", "device"], "nothing is moved in vain"
    cache.release(second)
    assert not cache.make_room(size)
    cache.release(second)
    assert cache.make_room(size)
    assert tiers(cache, 0, 1) == ["device", "host"]
    assert not cache.make_room(2 * size)
    cache.release(first)
    assert cache.make_room(2 * size)
    with pytest.raises(ValueError, match="expected the handle of a prefix on the devices"):
        cache.hold(first)
    with pytest.raises(ValueError, match="expected the handle of a prefix that is held"):
        cache.release(first)
    assert cache.find(cache.name(tokens(LENGTH, 0))).handle == first
    cache.hold(first)
    cache.remove(first.key)
    cache.release(first)
    with pytest.raises(ValueError, match="expected the handle of a prefix on the devices"):
        cache.hold(first)


def test_what_was_put_without_room_leaves_once_it_is_released(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(1.5 * size))
    (first,) = full(cache, decoder, 0)
    cache.hold(first)
    (second,) = full(cache, decoder, 1)
    cache.hold(second)
    assert cache.bytes()["device"] == 2 * size
    cache.release(first)
    assert tiers(cache, 0, 1) == ["host", "device"]


def test_on_the_host_the_least_recently_used_goes_first_and_what_is_pinned_stays(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(1.5 * size), host_gib=gib(2.5 * size))
    cache.pin(cache.name(tokens(LENGTH, 0)).key, pinned=True)
    full(cache, decoder, 0, 1, 2, 3)
    assert tiers(cache, 0, 1, 2, 3) == ["host", None, "host", "device"]
    cache.pin(cache.name(tokens(LENGTH, 0)).key, pinned=False)
    full(cache, decoder, 4)
    assert tiers(cache, 0, 2, 3, 4) == [None, "host", "host", "device"]


def test_what_is_pinned_stays_on_the_device_where_the_host_has_no_room(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(2.5 * size), host_gib=0.0)
    cache.pin(cache.name(tokens(LENGTH, 0)).key, pinned=True)
    full(cache, decoder, 0, 1, 2)
    assert tiers(cache, 0, 1, 2) == ["device", None, "device"]
    assert not cache.make_room(2 * size)


def test_nothing_is_found_where_the_device_has_no_room(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(1.5 * size))
    full(cache, decoder, 0)
    (second,) = full(cache, decoder, 1)
    cache.hold(second)
    assert cache.find(cache.name(tokens(LENGTH, 0))).prefix is None
    assert cache.find(cache.name(changed(tokens(LENGTH, 1), 3 * CHUNK, LENGTH))).prefix is None
    assert tiers(cache, 0, 1) == ["host", "device"]
    cache.release(second)
    assert cache.find(cache.name(tokens(LENGTH, 0))).tokens == LENGTH


def test_what_is_being_read_takes_room_until_it_is_given_back(decoder, tmp_path: Path, size):
    cache = cache_of(decoder, tmp_path, device_gib=gib(2.5 * size))
    (first, _) = full(cache, decoder, 0, 1)
    cache.hold(first)
    assert cache.reserve(size) and tiers(cache, 0, 1) == ["device", "host"] and cache.bytes()["device"] == 2 * size
    assert (
        not cache.make_room(size) and not cache.reserve(size) and cache.find(cache.name(tokens(LENGTH, 1))).tokens == 0
    )
    cache.give_back(size)
    assert cache.bytes()["device"] == size and cache.find(cache.name(tokens(LENGTH, 1))).tokens == LENGTH
    cache.release(first)
    assert cache.reserve(2 * size) and cache.bytes() == {"device": 2 * size, "host": 2 * size, "disk": 0}


@pytest.mark.parametrize("host_gib", [0.0, 1.0])
def test_what_leaves_memory_is_on_disk(decoder, tmp_path: Path, size, host_gib):
    cache = cache_of(decoder, tmp_path, device_gib=gib(1.5 * size), host_gib=host_gib * gib(1.5 * size), disk_gib=1.0)
    full(cache, decoder, 0, 1, 2)
    assert tiers(cache, 0, 1, 2) == ["disk", "host" if host_gib else "disk", "device"]
    found = cache.find(cache.name(tokens(LENGTH, 0)))
    assert found.tier == "disk"
    check_head(found.prefix, decoder, tokens(LENGTH, 0), LENGTH)
    assert cache.bytes()["disk"] > 0


@pytest.mark.parametrize("mesh", ["one device", "context 4, model 2", "kv heads copied"])
def test_save_stores_what_is_not_there_yet_from_either_tier(tmp_path: Path, mesh):
    decoder = decoder_on(MESHES[mesh])
    size = cache_of(decoder, tmp_path).bytes_for(LENGTH)
    cache = cache_of(decoder, tmp_path, device_gib=gib(1.5 * size), disk_gib=1.0)
    full(cache, decoder, 0, 1)
    assert tiers(cache, 0, 1) == ["host", "device"]
    cache.save(most=1)
    assert len(list((tmp_path / "prefixes").iterdir())) == 1
    cache.save()
    before = {path: path.stat().st_ino for path in (tmp_path / "prefixes").glob("*/manifest.json")}
    cache.save()
    assert before == {path: path.stat().st_ino for path in (tmp_path / "prefixes").glob("*/manifest.json")}
    reader = decoder_on(MESHES["context 2"], "stacked")
    other = cache_of(reader, tmp_path, disk_gib=1.0)
    for seed in (0, 1):
        found = other.find(other.name(tokens(LENGTH, seed)))
        assert found.tier == "disk"
        check_head(found.prefix, reader, tokens(LENGTH, seed), LENGTH)
    assert len(before) == 2


def test_a_damaged_entry_is_not_used(decoder, tmp_path: Path, caplog):
    cache = cache_of(decoder, tmp_path, disk_gib=1.0)
    full(cache, decoder, 0)
    cache.save()
    data = next((tmp_path / "prefixes").rglob("c/0/0/0/0"))
    data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
    other = cache_of(decoder, tmp_path, disk_gib=1.0)
    assert other.find(other.name(tokens(LENGTH))).prefix is None
    assert "unusable and will be computed again" in caplog.text
    assert other.bytes()["disk"] == 0


def test_owners_share_what_is_public_alone(decoder, tmp_path: Path):
    cache, head = cache_of(decoder, tmp_path, disk_gib=1.0), tokens(LENGTH)
    cache.put(cache.name(head, "ann"), prefix_of(decoder, head))
    cache.save()
    for again in (cache, cache_of(decoder, tmp_path, disk_gib=1.0)):
        assert (
            again.tier(again.name(head, "ann").key)
            and not again.tier(again.name(head, "bob").key)
            and not again.tier(again.name(head).key)
        )
        assert (
            again.find(again.name(head, "bob")).prefix is None
            and again.find(again.name(head, "ann", public=True)).prefix is None
        )
        assert again.find(again.name(changed(head, 3 * CHUNK, LENGTH), "bob")).prefix is None
        assert again.find(again.name(changed(head, 3 * CHUNK, LENGTH), "ann")).tokens == 3 * CHUNK
    handle = cache.put(cache.name(head, "ann", public=True), prefix_of(decoder, head))
    assert cache.find(cache.name(head, "bob", public=True)).handle == handle


def test_other_numbers_have_other_names(decoder, tmp_path: Path):
    head = tokens(LENGTH)
    names = {
        cache_of(decoder, tmp_path).name(head).key,
        cache_of(decoder, tmp_path, kv="int8").name(head).key,
        cache_of(decoder, tmp_path, disk_gib=1.0).name(head).key,
        cache_of(decoder, tmp_path).name(head[:-1]).key,
        cache_of(decoder, tmp_path).name([*head[:-1], head[-1] + 1]).key,
        cache_of(decoder, tmp_path).name(head, "ann").key,
    }
    assert len(names) == 6


def test_a_removed_prefix_is_gone_from_every_tier_but_for_who_reads_it(decoder, tmp_path: Path, size):
    cache, head = cache_of(decoder, tmp_path, device_gib=gib(1.5 * size), disk_gib=1.0), tokens(LENGTH)
    handle = cache.put(cache.name(head), prefix_of(decoder, head))
    cache.save()
    cache.hold(handle)
    cache.remove(handle.key)
    assert cache.tier(cache.name(head).key) is None and cache.find(cache.name(head)).prefix is None
    assert cache.bytes() == {"device": size, "host": 0, "disk": 0}
    assert not cache.make_room(size), "its room is not free yet"
    cache.release(handle)
    assert cache.bytes()["device"] == 0 and cache.make_room(size)
    again = cache.put(cache.name(head), prefix_of(decoder, head))
    assert again != handle and again.key == handle.key
    cache.remove(again.key)
    assert cache.bytes() == {"device": 0, "host": 0, "disk": 0}


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_rounded_prefix_is_kept_whole_in_every_tier(tmp_path: Path, mesh, layout):
    """On the devices, on the host, on disk and on the devices again: the same bits, in half the memory."""
    decoder, head = decoder_on(MESHES[mesh], layout), tokens(LENGTH)
    cache = cache_of(decoder, tmp_path, kv="int8", disk_gib=1.0)
    prefix = quantize_kv(prefix_of(decoder, head))
    cache.put(cache.name(head), prefix)
    assert cache.bytes()["device"] < 0.4 * cache.bytes_for(LENGTH)  # of float32, heads of 8: a quarter and an eighth
    assert cache.find(cache.name(changed(head, 3 * CHUNK, LENGTH))).prefix is None
    assert cache.make_room(2**30) and cache.tier(cache.name(head).key) == "host"
    cache.save()
    found = cache.find(cache.name(head))
    check_same(found.prefix, prefix)
    stored = cache_of(decoder, tmp_path, kv="int8", disk_gib=1.0).find(cache.name(head))
    assert stored.tier == "disk" and stored.prefix is not None
    used = np.asarray(prefix.pos_BS)[0] >= 0
    pairs = zip(*((p.layers if layout == "unrolled" else [p.layers]) for p in (stored.prefix, prefix)), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one.k_BKSH[..., used, :], other.k_BKSH[..., used, :])
        np.testing.assert_array_equal(one.v_BKSH[..., used], other.v_BKSH[..., used])
        np.testing.assert_array_equal(one.k_scale_BKS[..., used], other.k_scale_BKS[..., used])
        np.testing.assert_array_equal(one.v_scale_BKS[..., used], other.v_scale_BKS[..., used])
        assert one.v_BKSH.sharding.is_equivalent_to(other.v_BKSH.sharding, other.v_BKSH.ndim)
