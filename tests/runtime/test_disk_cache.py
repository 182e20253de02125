# SPDX-License-Identifier: Apache-2.0
"""One bound for all kinds: what was used last stays, what is read stays, and nobody else's file is touched."""

import fcntl
import os
from pathlib import Path

import pytest

from rapid_jax.runtime import disk_cache
from rapid_jax.runtime.disk_cache import BOUNDED, KINDS, entries, make_room, remove

SIZE = 1000


def name_of(number: int) -> str:
    return f"{number:064x}"


def kept(root: Path, kind: str, number: int, used: float) -> Path:
    """An entry of SIZE bytes, last used then."""
    name = {"embeddings": "{}.npy", "programs": "jit_f-{}-cache", "digests": "{}.txt"}.get(kind, "{}")
    path = root / kind / name.format(name_of(number))
    file = path / "part" / "data" if kind in ("prefixes", "indices") else path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * SIZE)
    os.utime(path, (used, used))
    return path


def test_every_kind_is_listed_with_its_bytes_and_last_use(tmp_path: Path):
    assert entries(tmp_path) == []
    paths = {kind: kept(tmp_path, kind, 1, used=100 + turn) for turn, kind in enumerate(KINDS)}
    found = entries(tmp_path)
    assert {entry.kind: entry.path for entry in found} == paths
    assert [entry.bytes for entry in found] == [SIZE] * 5
    assert [entry.used for entry in found] == [100, 101, 102, 103, 104]
    assert [entry.kind for entry in entries(tmp_path, ["programs"])] == ["programs"]


def test_the_least_recently_used_of_all_kinds_goes_first(tmp_path: Path):
    order = ["programs", "prefixes", "embeddings", "indices", "programs", "prefixes"]
    paths = [kept(tmp_path, kind, turn, used=100 + turn) for turn, kind in enumerate(order)]
    digest = kept(tmp_path, "digests", 9, used=1)
    removed = make_room(entries(tmp_path, BOUNDED), 5 * SIZE, wanted=2 * SIZE)
    assert [entry.path for entry in removed] == paths[:3]
    assert [path.exists() for path in paths] == [False] * 3 + [True] * 3 and digest.exists()
    assert make_room(entries(tmp_path, BOUNDED), 5 * SIZE, wanted=2 * SIZE) == []
    assert [entry.path for entry in make_room(entries(tmp_path, BOUNDED), SIZE, 0, newest=paths[3])] == paths[4:]
    assert make_room(entries(tmp_path, BOUNDED), SIZE, SIZE, newest=paths[3]) == [], "the newest fits alone"
    assert [entry.path for entry in make_room(entries(tmp_path, BOUNDED), SIZE - 1, 0, newest=paths[3])] == [paths[3]]


def test_a_prefix_that_is_read_stays(tmp_path: Path):
    old, new = kept(tmp_path, "prefixes", 0, used=1), kept(tmp_path, "prefixes", 1, used=2)
    with open(old / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        os.utime(old, (1, 1))
        assert [entry.path for entry in make_room(entries(tmp_path), 0, 0)] == [new]
        assert old.exists()
    assert [entry.path for entry in make_room(entries(tmp_path), 0, 0)] == [old]


def test_a_programs_note_goes_with_it(tmp_path: Path):
    path = kept(tmp_path, "programs", 0, used=1)
    note = path.with_name(path.name.replace("-cache", "-atime"))
    note.write_bytes(b"12345678")
    (entry,) = entries(tmp_path)
    assert remove(entry) and list((tmp_path / "programs").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_the_caches_own_is_neither_listed_nor_removed(tmp_path: Path, kind):
    folder = tmp_path / kind
    folder.mkdir()
    for name in ("thesis", ".profile", "0" * 63, "0" * 64 + ".pdf", "notes-cache", "0" * 64 + ".npy.old"):
        (folder / name).write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    real = kept(tmp_path / "elsewhere", kind, 0, used=1)
    (folder / real.name).symlink_to(real)
    wrong = folder / ("1" * 64 if kind in ("prefixes", "indices") else real.name.replace("0" * 64, "1" * 64))
    (wrong.write_text if kind in ("prefixes", "indices") else lambda _: wrong.mkdir())("a file, not a folder")
    listed = [entry.path for entry in entries(tmp_path)]
    assert listed in ([], [folder / real.name]), "a link counts as itself"
    for entry in entries(tmp_path):
        remove(entry)
    assert real.exists() and (folder / "thesis").exists() and wrong.exists()


def test_an_entry_that_goes_meanwhile_is_no_error(tmp_path: Path, monkeypatch):
    path = kept(tmp_path, "prefixes", 0, used=1)
    (entry,) = entries(tmp_path)
    assert remove(entry) and remove(entry)

    def gone(folder):
        raise FileNotFoundError(folder)

    kept(tmp_path, "prefixes", 0, used=1)
    monkeypatch.setattr(disk_cache, "bytes_in", gone)
    assert entries(tmp_path) == [] and path.exists()
