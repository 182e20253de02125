# SPDX-License-Identifier: Apache-2.0
"""`rapid cache`: what is told of each kind, what is removed, and that damage of every kind is found."""

import builtins
import errno
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rapid_jax.cli import main
from rapid_jax.config import CacheConfig, RapidConfig
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.index import Index
from rapid_jax.retrieval.store import EmbeddingStore
from rapid_jax.runtime import settings
from rapid_jax.runtime.disk_cache import KINDS, entries
from rapid_jax.runtime.storage import working_place
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.speculative.test_prefix_store import prefix_of

KEY = "ab" * 32


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    """A cache with an entry of every kind."""
    root = tmp_path / "cache"
    monkeypatch.setenv("RAPID_JAX_CACHE", str(root))
    PrefixStore(root / "prefixes", 1 << 30, quiet=True).save(KEY, prefix_of("unrolled"))
    vectors_NE = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    EmbeddingStore(root / "embeddings").save(KEY, vectors_NE, np.arange(len(vectors_NE), dtype=np.int32))
    Index.build(vectors_NE, RetrievalConfig(index="tree")).save(root / "indices" / KEY)
    for kind, name, data in (
        ("programs", f"jit_f-{KEY}-cache", zlib.compress(b"program" * 100)),
        ("digests", f"{KEY}.txt", KEY.encode()),
    ):
        (root / kind).mkdir()
        (root / kind / name).write_bytes(data)
    return root


def told(capsys, *words: str) -> tuple[int, dict]:
    status = main(["cache", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_list_tells_of_every_kind(root: Path, capsys, tmp_path: Path):
    status, found = told(capsys, "list")
    assert status == 0 and found["folder"] == str(root) and list(found["kinds"]) == list(KINDS)
    assert [kind["entries"] for kind in found["kinds"].values()] == [1] * 5
    sizes = {kind: of["bytes"] for kind, of in found["kinds"].items()}
    assert sizes["digests"] == 64 and found["bytes"] == sum(sizes.values()) - 64 and min(sizes.values()) > 0
    assert found["bound_bytes"] == 20 * 2**30
    assert found["kinds"]["digests"]["last_used"] == pytest.approx(os.stat(root / "digests" / f"{KEY}.txt").st_mtime)

    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(root) and [line.split()[0] for line in lines[2:7]] == list(KINDS)
    assert "of 20.0 GiB (cache.disk_gib" in lines[7]

    config = RapidConfig(cache=CacheConfig(folder=str(tmp_path / "other"), disk_gib=0.5))
    settings.save(config, tmp_path / "run.yaml")
    _, found = told(capsys, "list", "--config", str(tmp_path / "run.yaml"))
    assert found["folder"] == str(tmp_path / "other") and (found["bytes"], found["bound_bytes"]) == (0, 2**29)
    assert {kind["last_used"] for kind in found["kinds"].values()} == {None}
    assert not (tmp_path / "other").exists()


def test_clear_removes_the_kinds_that_are_named(root: Path, capsys):
    status, found = told(capsys, "clear", "programs", "indices")
    assert status == 0 and found["removed"] == {"indices": 1, "programs": 1} and found["kept"] == []
    assert {entry.kind for entry in entries(root)} == {"prefixes", "embeddings", "digests"}
    assert main(["cache", "clear"]) == 0
    assert "1 prefixes, 1 embeddings, 0 indices, 0 programs, 1 digests" in capsys.readouterr().out
    assert entries(root) == []
    assert main(["cache", "clear", "prefix"]) == 2
    assert "expected prefixes, embeddings, indices, programs, digests, got prefix" in capsys.readouterr().err


def test_clear_leaves_what_is_read_and_takes_what_killed_processes_left(root: Path, capsys):
    half = root / "prefixes" / f".{KEY}.{'0' * 16}"
    half.mkdir()
    os.utime(half, (0, 0))
    (root / "embeddings" / f".{KEY}.npy.{'0' * 16}").write_bytes(b"half")
    with open(root / "prefixes" / KEY / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        _, found = told(capsys, "clear")
        assert found["kept"] == [str(root / "prefixes" / KEY)]
        assert main(["cache", "clear"]) == 0
        assert f"kept, in use or not to be removed: {root / 'prefixes' / KEY}" in capsys.readouterr().out
    assert [entry.kind for entry in entries(root)] == ["prefixes"]
    assert not half.exists() and list((root / "embeddings").iterdir()) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a changed prefix": ("prefixes", lambda path: flipped(largest(path))),
    "a cut prefix": ("prefixes", lambda path: cut(largest(path))),
    "a prefix without its manifest": ("prefixes", lambda path: (path / "manifest.json").unlink()),
    "a prefix of another name": ("prefixes", lambda path: path.rename(path.with_name("cd" * 32))),
    "changed embeddings": ("embeddings", flipped),
    "cut embeddings": ("embeddings", cut),
    "a changed index": ("indices", lambda path: flipped(largest(path))),
    "an index without a file": ("indices", lambda path: (path / "dataset.npy").unlink()),
    "a cut program": ("programs", cut),
    "a program of another kind": ("programs", lambda path: path.write_bytes(b"program")),
    "a cut program of zstd": ("programs", lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd\x24\x03")),
    "a changed digest": ("digests", lambda path: path.write_bytes(b"x" * 64)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_what_is_damaged_and_removes_it_if_told(root: Path, capsys, damage):
    kind, spoil = DAMAGE[damage]
    assert told(capsys, "verify") == (0, {"folder": str(root), "checked": dict.fromkeys(KINDS, 1), "damaged": []})
    (entry,) = entries(root, [kind])
    spoil(entry.path)
    (entry,) = entries(root, [kind])
    status, found = told(capsys, "verify")
    (item,) = found["damaged"]
    assert status == 1 and (item["kind"], item["path"], item["removed"]) == (kind, str(entry.path), False)
    assert item["reason"] and found["checked"] == dict.fromkeys(KINDS, 1) and entry.path.exists()
    assert main(["cache", "verify", "--remove"]) == 1
    assert f"damaged, removed: {entry.path}: " in capsys.readouterr().out
    assert not entry.path.exists() and len(entries(root)) == 4
    assert main(["cache", "verify"]) == 0


@pytest.mark.parametrize("kind", ["prefixes", "embeddings", "indices", "programs", "digests"])
def test_what_cannot_be_read_is_no_damage_and_removes_nothing(root: Path, capsys, monkeypatch, kind):
    (root / "digests" / f"{'0' * 64}.txt").write_bytes(b"damaged")
    (entry,) = [entry for entry in entries(root, [kind]) if "0" * 64 not in entry.path.name]

    def refused(open_):
        def call(path, *given, **asked):
            if isinstance(path, str | Path) and str(path).startswith(str(entry.path)) and "/lock" not in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return open_(path, *given, **asked)

        return call

    for module, name in ((io, "open"), (builtins, "open"), (os, "open")):
        monkeypatch.setattr(module, name, refused(getattr(module, name)))
    assert main(["cache", "verify", "--remove"]) == 2
    assert re.fullmatch(rf"rapid: {entry.path}[^:]*: Permission denied\n", capsys.readouterr().err)
    monkeypatch.undo()
    assert len(entries(root)) == 6


def test_a_store_that_refuses_a_prefix_removes_nothing(bucket, no_waits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RAPID_JAX_CACHE", "gs://models/refused")
    place = working_place("gs://models/refused/prefixes", "x")
    store = PrefixStore(place, 1 << 30, quiet=True)
    store.save(KEY, prefix_of("unrolled"))
    kept = bucket.names("refused/")
    for part, fault, status, said in (
        ("manifest.json", "403", 2, f"{place}/{KEY}/manifest.json: no permission to read it"),
        ("manifest.json", "503", 75, f"{place}/{KEY}/manifest.json: the store failed"),
        ("BKSH", "403", 2, f"{place}/{KEY}/"),
    ):
        bucket.fault = lambda asked, part=part, fault=fault: fault if part in asked else None
        assert main(["cache", "verify", "--remove"]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"rapid: {said}")
        bucket.heal()
        assert bucket.names("refused/") == kept
    bucket.put(next(name for name in kept if "/k_BKSH/c/" in name), b"short")
    assert told(capsys, "verify", "--remove")[1]["damaged"][0]["removed"]
    assert not PrefixStore(place, 1 << 30, quiet=True).has(KEY)


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path / "absent"))
    for command in ("list", "clear", "verify"):
        assert main(["cache", command]) == 0
    assert not (tmp_path / "absent").exists() and "0 bytes of 20.0 GiB" in capsys.readouterr().out


def test_what_jax_writes_is_listed_and_whole(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path))
    program = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    given = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    given |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | given, check=True)
    status, found = told(capsys, "verify")
    written = [path for path in (tmp_path / "programs").iterdir() if path.is_file()]
    assert status == 0 and found["checked"]["programs"] == len(written) > 0
    assert main(["cache", "clear", "programs"]) == 0
    assert [path for path in (tmp_path / "programs").iterdir() if path.is_file()] == []
