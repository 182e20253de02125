# SPDX-License-Identifier: Apache-2.0
"""What was stored of one place is never used in another, nor with another bit."""

import itertools
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.runtime.array_store import Damaged
from rapid_jax.speculative import prefix_arrays
from rapid_jax.speculative.prefix_check import check_entry
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.speculative.test_prefix_store import HEAD_DIM, LARGE, PLACE, check_same, key_of, prefix_of


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrefixStore:
    """Of pieces of 5 tokens of one kv head."""
    monkeypatch.setattr(prefix_arrays, "_PIECE_BYTES", HEAD_DIM * 4 * 5)
    store = PrefixStore(tmp_path / "prefixes", LARGE, quiet=True)
    for number in (0, 1):
        store.save(key_of(number), prefix_of("unrolled", seed=number))
    return store


def entry_of(store: PrefixStore, number: int = 0) -> Path:
    return Path(str(store.place)) / key_of(number)


def kept(store: PrefixStore, spare: Path, number: int = 0) -> None:
    """The entry is put back as it was written: what is damaged is removed."""
    shutil.rmtree(entry_of(store, number), ignore_errors=True)
    shutil.copytree(spare, entry_of(store, number))


def loaded(store: PrefixStore, number: int = 0) -> Prefix | None:
    return store.load(key_of(number), layout="stacked", place=PLACE)


def files_of(entry: Path) -> list[Path]:
    return sorted(path for path in entry.rglob("*") if path.is_file() and path.name != "lock")


def test_a_bit_flipped_in_any_file_is_found(tmp_path: Path):
    store = PrefixStore(tmp_path / "prefixes", LARGE, quiet=True)
    store.save(key_of(), prefix_of("unrolled"))
    want, spare = loaded(store), tmp_path / "spare"
    assert want is not None
    shutil.copytree(entry_of(store), spare)
    random = np.random.default_rng(0)
    for path in files_of(entry_of(store)):
        data = bytearray(path.read_bytes())
        at = int(random.integers(8 * len(data)))
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        if path.name == "zarr.json":  # for other programs: nobody reads it here
            check_entry(entry_of(store))
            check_same(loaded(store), want)
        else:
            with pytest.raises(Damaged, match=r"expected|checksum|JSON"):
                check_entry(entry_of(store))
            assert loaded(store) is None and not entry_of(store).exists()
        kept(store, spare)


def test_a_piece_in_the_place_of_another_is_found(store: PrefixStore, tmp_path: Path):
    """Of another layer, head, document, of other tokens, values for keys; with the sums of that place, too."""
    (arrays,) = (path for path in entry_of(store).iterdir() if path.is_dir())
    (others,) = (path for path in entry_of(store, 1).iterdir() if path.is_dir())
    spare = tmp_path / "spare"
    shutil.copytree(entry_of(store), spare)
    for other, fields in itertools.product(
        ("1/0/0", "0/1/0", "0/0/1"), (("k_BKSH",), ("k_BKSH", "v_BKSH", "sums_BKS"))
    ):
        for field in fields:
            last = "" if field == "sums_BKS" else "/0"
            swap(arrays / field / "c" / f"0/0/0{last}", arrays / field / "c" / f"{other}{last}")
        assert_found(store, spare)
    swap(arrays / "k_BKSH/c/0/0/0/0", arrays / "v_BKSH/c/0/0/0/0")
    assert_found(store, spare)
    for field in ("k_BKSH", "v_BKSH", "sums_BKS"):
        shutil.rmtree(arrays / field)
        shutil.copytree(others / field, arrays / field)
    assert_found(store, spare)


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def assert_found(store: PrefixStore, spare: Path) -> None:
    with pytest.raises(Damaged, match=r"layer [01], .*expected the keys and values that were written"):
        check_entry(entry_of(store))
    assert loaded(store) is None and not entry_of(store).exists()
    kept(store, spare)


def test_scales_are_known_too_and_sums_of_the_host_are_those_of_a_device(tmp_path: Path):
    store = PrefixStore(tmp_path, LARGE, quiet=True)
    store.save(key_of(), quantize_kv(prefix_of("stacked")))
    store.save(key_of(1), jax.tree.map(np.asarray, quantize_kv(prefix_of("stacked"))))
    want = loaded(store)
    check_same(loaded(store, 1), want if want is not None else prefix_of("stacked"))
    check_entry(entry_of(store)), check_entry(entry_of(store, 1))
    for number, field in enumerate(("v_BKSH", "v_scale_BKS")):
        piece = next(path for path in files_of(entry_of(store, number)) if f"/{field}/c/2/" in str(path))
        with open(piece, "r+b") as file:
            file.seek(os.path.getsize(piece) - 1)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 128]))
        assert loaded(store, number) is None
