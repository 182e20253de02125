# SPDX-License-Identifier: Apache-2.0
"""A stored prefix is read back exactly, in either layout, or reported, removed and made again."""

import fcntl
import gc
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.model.decoder import Layout
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.speculative import prefix_arrays, prefix_folder, prefix_store
from rapid_jax.speculative.prefix_heads import Place
from rapid_jax.speculative.prefix_store import PrefixStore

LAYERS, HEADS, SLOTS, HEAD_DIM = 3, 2, 12, 4
TOKENS = 9
PLACE = Place.of(TOKENS, SLOTS, 4, 1)
LARGE = 1 << 30


def prefix_of(layout: str, dtype=jnp.float32, seed: int = 0) -> Prefix:
    """9 tokens in 12 slots, with leftovers of a chunk in slots 9 to 11."""
    keys = jax.random.split(jax.random.key(seed), 2 * LAYERS)
    made = [jax.random.normal(key, (1, HEADS, SLOTS, HEAD_DIM)).astype(dtype) for key in keys]
    layers = tuple(KV(k, v) for k, v in zip(made[::2], made[1::2], strict=True))
    slots = np.arange(SLOTS, dtype=np.int32)
    pos_BS = jnp.asarray(np.where(slots < TOKENS, slots, -1)[None])
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return Prefix(layers if layout == "unrolled" else stacked, pos_BS, jnp.asarray(TOKENS, jnp.int32))


def key_of(number: int = 0) -> str:
    return digest(str(number))


def loaded_from(store: PrefixStore, number: int = 0, layout: Layout = "unrolled") -> Prefix | None:
    return store.load(key_of(number), layout=layout, place=PLACE)


def emptied(prefix: Prefix) -> Prefix:
    """What the same prefix must come back as: leftovers gone."""
    layers = jax.tree.map(lambda a: a.at[..., TOKENS:, :].set(0), prefix.layers)
    return Prefix(layers, prefix.pos_BS, prefix.used)


def check_same(got: Prefix | None, expected: Prefix) -> None:
    assert got is not None
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape, one.weak_type) == (other.dtype, other.shape, other.weak_type)
        np.testing.assert_array_equal(one, other)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loaded", ["stacked", "unrolled"])
@pytest.mark.parametrize("saved", ["stacked", "unrolled"])
def test_what_is_loaded_is_what_was_saved_in_the_layout_asked_for(tmp_path: Path, saved, loaded, dtype):
    store = PrefixStore(tmp_path / "store", LARGE)
    assert loaded_from(store, layout=loaded) is None
    store.save(key_of(), prefix_of(saved, dtype))
    check_same(loaded_from(store, layout=loaded), emptied(prefix_of(loaded, dtype)))


def test_both_layouts_write_the_same_files_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix_arrays, "_PIECE_BYTES", HEAD_DIM * 4 * 5)
    monkeypatch.setattr(prefix_folder, "secrets", SimpleNamespace(token_hex=lambda count: "0" * 2 * count))

    def files(layout) -> dict[str, bytes]:
        store = PrefixStore(tmp_path / layout, LARGE)
        store.save(key_of(), prefix_of(layout))
        check_same(loaded_from(store, layout=layout), emptied(prefix_of(layout)))
        entry = tmp_path / layout / key_of()
        return {path.relative_to(entry).as_posix(): path.read_bytes() for path in entry.rglob("*") if path.is_file()}

    found = files("stacked")
    assert found == files("unrolled")
    pieces = [name for name in found if "/c/" in name]
    sizes = {name.split("/")[1]: len(found[name]) for name in pieces}
    assert len(pieces) == 3 * LAYERS * HEADS * 2
    assert sizes == {"k_BKSH": 5 * HEAD_DIM * 4, "v_BKSH": 5 * HEAD_DIM * 4, "sums_BKS": 5 * 4}


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_a_loaded_prefix_is_uncommitted_so_no_program_is_compiled_again(tmp_path: Path, layout):
    store, fresh = PrefixStore(tmp_path, LARGE), prefix_of(layout)
    store.save(key_of(), fresh)
    loaded = loaded_from(store, layout=layout)
    assert {leaf.committed for leaf in jax.tree.leaves(fresh)} == {False}
    assert {leaf.committed for leaf in jax.tree.leaves(loaded)} == {False}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"tokens": 9', '"tokens": 8'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped bit": lambda entry: flip(piece_of(entry)),
    "truncated": lambda entry: os.truncate(piece_of(entry), piece_of(entry).stat().st_size // 2),
    "missing": lambda entry: piece_of(entry).unlink(),
    "edited manifest": lambda entry: edit(entry / "manifest.json"),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "no arrays": lambda entry: shutil.rmtree(next(path for path in entry.iterdir() if path.is_dir())),
}


def piece_of(entry: Path) -> Path:
    return next(path for path in sorted(entry.rglob("c/*/*/*/*")) if path.is_file())


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_removed_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage):
    store, prefix = PrefixStore(tmp_path, LARGE), prefix_of("unrolled")
    store.save(key_of(), prefix)
    DAMAGE[damage](tmp_path / key_of())

    assert loaded_from(store) is None
    (message,) = warnings_of(caplog)
    assert str(tmp_path / key_of()) in message
    assert "unusable and will be computed again" in message
    assert "\n" not in message
    assert names(tmp_path) == []

    store.save(key_of(), prefix)
    check_same(loaded_from(store), emptied(prefix))
    assert warnings_of(caplog) == []


def test_an_entry_under_another_documents_name_is_never_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = PrefixStore(tmp_path, LARGE)
    store.save(key_of(1), prefix_of("unrolled"))
    (tmp_path / key_of(1)).rename(tmp_path / key_of(2))
    assert loaded_from(store, 2) is None
    assert "the checksum does not match" in warnings_of(caplog)[0]
    assert names(tmp_path) == []


def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store, prefix = PrefixStore(tmp_path, LARGE), prefix_of("unrolled")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        store.save(key_of(), prefix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    (message,) = warnings_of(caplog)
    assert str(tmp_path / key_of()) in message
    assert "could not be stored" in message
    assert "File too large" in message
    assert "\n" not in message
    assert names(tmp_path) == []


def test_a_store_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    store = PrefixStore(tmp_path / "file" / "store", LARGE)
    assert loaded_from(store, layout="stacked") is None
    store.save(key_of(), prefix_of("stacked"))
    (message,) = warnings_of(caplog)
    assert "could not be stored" in message
    assert "Not a directory" in message


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_least_recently_used_go_first(tmp_path: Path):
    store, prefix = PrefixStore(tmp_path, LARGE), prefix_of("unrolled")
    for number in range(3):
        store.save(key_of(number), prefix)
        os.utime(tmp_path / key_of(number), (number, number))
    assert loaded_from(store, 0) is not None
    entry = size_of(tmp_path) // 3  # within 2 KB: metadata is compressed

    PrefixStore(tmp_path, 3 * entry + entry // 2).save(key_of(3), prefix)
    assert set(names(tmp_path)) == {key_of(0), key_of(2), key_of(3)}, "0 was read last, 1 was the oldest"
    PrefixStore(tmp_path, entry + entry // 2).save(key_of(4), prefix)
    assert names(tmp_path) == [key_of(4)]


def test_one_larger_than_all_the_room_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    prefix = prefix_of("unrolled")
    PrefixStore(tmp_path, LARGE).save(key_of(0), prefix)
    payload = 2 * LAYERS * HEADS * TOKENS * HEAD_DIM * 4
    PrefixStore(tmp_path, payload - 1).save(key_of(1), prefix)
    assert names(tmp_path) == [key_of(0)]
    assert f"it has {payload} bytes, of {payload - 1} allowed" in warnings_of(caplog)[0]
    PrefixStore(tmp_path, payload).save(key_of(1), prefix)
    assert names(tmp_path) == []
    assert "document not kept" in warnings_of(caplog)[0]


def test_an_entry_that_is_being_read_is_not_evicted(tmp_path: Path):
    store, prefix = PrefixStore(tmp_path, LARGE), prefix_of("unrolled")
    store.save(key_of(0), prefix)
    with open(tmp_path / key_of(0) / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        PrefixStore(tmp_path, size_of(tmp_path) * 3 // 2).save(key_of(1), prefix)
        assert set(names(tmp_path)) == {key_of(0), key_of(1)}
    PrefixStore(tmp_path, size_of(tmp_path) * 3 // 4).save(key_of(2), prefix)
    assert names(tmp_path) == [key_of(2)]


def test_an_entry_that_goes_while_its_reader_waits_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store, loaded = PrefixStore(tmp_path, LARGE), []
    store.save(key_of(), prefix_of("unrolled"))
    with open(tmp_path / key_of() / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reader = threading.Thread(target=lambda: loaded.append(loaded_from(store)))
        reader.start()
        reader.join(0.2)
        assert reader.is_alive()
        shutil.rmtree(tmp_path / key_of())
    reader.join()
    assert loaded == [None]
    assert warnings_of(caplog) == []


def test_what_is_there_is_not_written_again(tmp_path: Path):
    store = PrefixStore(tmp_path, LARGE)
    store.save(key_of(), prefix_of("unrolled"))
    before = (tmp_path / key_of() / "manifest.json").stat().st_ino
    store.save(key_of(), prefix_of("unrolled"))
    assert (tmp_path / key_of() / "manifest.json").stat().st_ino == before


def test_two_writers_of_one_key_both_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    both, rename = threading.Barrier(2, timeout=60), Path.rename

    def meet_and_rename(path: Path, target: Path):
        if target == tmp_path / key_of():
            both.wait()
        return rename(path, target)

    store, prefix, failures = PrefixStore(tmp_path, LARGE), prefix_of("unrolled"), []
    monkeypatch.setattr(Path, "rename", meet_and_rename)
    monkeypatch.setattr(threading, "excepthook", failures.append)
    writers = [threading.Thread(target=store.save, args=(key_of(), prefix)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert both.n_waiting == 0
    assert names(tmp_path) == [key_of()]
    check_same(loaded_from(store), emptied(prefix))
    assert warnings_of(caplog) == []


LIVE_WRITER = """
import fcntl, os, sys, time
os.mkdir(sys.argv[1])
lock = open(os.path.join(sys.argv[1], "lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("writing", flush=True)
time.sleep(600)
"""


def test_a_killed_writers_leftovers_go_and_a_live_writers_stay(tmp_path: Path):
    store, prefix = PrefixStore(tmp_path, LARGE), prefix_of("unrolled")
    half, young = tmp_path / f".{key_of()}.{'0' * 16}", tmp_path / f".{key_of()}.{'1' * 16}"
    with subprocess.Popen([sys.executable, "-c", LIVE_WRITER, str(half)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        os.utime(half, (0, 0))
        store.save(key_of(1), prefix)
        assert set(names(tmp_path)) == {half.name, key_of(1)}
        writer.kill()
    young.mkdir()
    store.save(key_of(2), prefix)
    assert set(names(tmp_path)) == {young.name, key_of(1), key_of(2)}, "one made just now may not have its lock yet"
    os.utime(young, (0, 0))
    store.save(key_of(3), prefix)
    assert set(names(tmp_path)) == {key_of(1), key_of(2), key_of(3)}


def test_nothing_that_is_not_the_stores_own_is_ever_removed(tmp_path: Path):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / "Documents").mkdir()
    for path in (tmp_path / ".ssh" / "id", tmp_path / "Documents" / "thesis", tmp_path / ".profile"):
        path.write_text("precious" * 1000)
        os.utime(path, (0, 0))
    for path in (tmp_path / ".ssh", tmp_path / "Documents"):
        os.utime(path, (0, 0))
    before = size_of(tmp_path)
    PrefixStore(tmp_path, 20_000).save(key_of(), prefix_of("unrolled"))
    PrefixStore(tmp_path, 20_000).save(key_of(1), prefix_of("unrolled"))
    for path in tmp_path.glob("[0-9a-f]" * 64):
        shutil.rmtree(path)
    assert size_of(tmp_path) == before


def test_a_store_has_a_size():
    with pytest.raises(InputError, match="at least 0 bytes, got -1"):
        PrefixStore(Path("anywhere"), -1)


def test_a_device_without_room_to_cut_the_prefix_is_a_warning(tmp_path: Path, monkeypatch, caplog):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte")

    monkeypatch.setattr(prefix_store, "write", full)
    PrefixStore(tmp_path, LARGE, quiet=True).save(key_of(), prefix_of("unrolled"))
    (warning,) = warnings_of(caplog)
    assert "could not be stored" in warning and "RESOURCE_EXHAUSTED" in warning
    assert names(tmp_path) == []
