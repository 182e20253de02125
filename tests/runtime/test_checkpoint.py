# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is read back exactly, on any mesh, or refused: any changed byte is found."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rapid_jax.runtime import checkpoint
from rapid_jax.runtime.checkpoint import DamagedCheckpoint
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from tests.json_mutations import amiss, mutations

ROOT = Path(__file__).resolve().parents[2]


class Moments(NamedTuple):
    mean: jax.Array
    count: np.ndarray | int


def tree() -> dict:
    weights = jax.random.normal(jax.random.key(0), (5, 3))
    return {"layers": [{"w": weights}, {"w": weights.astype(jnp.bfloat16)}], "moments": Moments(weights + 1, 7)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with checkpoint.write(tmp_path / "saved", {"step": 3, "why": ["é", None]}) as writer:
        writer.add("model", tree())
        writer.add("extra", {"x": np.arange(4)})
    return tmp_path / "saved"


def same(got, expected) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and bool(np.array_equal(got, expected))


def test_without_a_target_arrays_come_by_name(saved: Path):
    read = checkpoint.read(saved)
    assert read.note == {"step": 3, "why": ["é", None]}
    assert read.items == ("model", "extra")
    got, expected = read.restore("model"), tree()
    assert set(got) == {"layers.0.w", "layers.1.w", "moments.mean", "moments.count"}
    assert all(isinstance(array, np.ndarray) for array in got.values())
    assert got["layers.1.w"].dtype == ml_dtypes.bfloat16
    assert same(got["layers.0.w"], expected["layers"][0]["w"])
    assert same(got["layers.1.w"], expected["layers"][1]["w"])
    assert same(got["moments.mean"], expected["moments"].mean)
    assert got["moments.count"] == 7
    assert same(read.restore("extra")["x"], np.arange(4))


def test_a_target_gives_its_tree_and_places_what_has_a_sharding(saved: Path):
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), tree())
    target["layers"][1]["w"] = jax.ShapeDtypeStruct((5, 3), jnp.bfloat16, sharding=there)
    got, expected = checkpoint.read(saved).restore("model", target), tree()
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert isinstance(got["layers"][1]["w"], jax.Array)
    assert got["layers"][1]["w"].sharding == there
    assert isinstance(got["moments"].mean, np.ndarray)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert same(one, np.asarray(other))


OTHER_MESH = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from rapid_jax.runtime import checkpoint
    from rapid_jax.runtime.mesh import MeshConfig, make_mesh

    def laid(mesh, spec):
        return NamedSharding(make_mesh(mesh), spec)

    folder, values = Path(sys.argv[1]), jnp.arange(64.0).reshape(8, 8)
    wrote = laid(MeshConfig(context=4, model=2), P("context", "model"))
    with checkpoint.write(folder, {}) as writer:
        writer.add("a", {"x": jax.device_put(values, wrote)})
    for reads in (laid(MeshConfig(fsdp=2, model=4), P("model", None)), laid(MeshConfig(data=8), P(None, "data"))):
        target = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=reads)}
        x = checkpoint.read(folder).restore("a", target)["x"]
        assert x.sharding == reads and len(x.addressable_shards) == 8
        np.testing.assert_array_equal(x, values)
    print("same on every mesh")
"""


def test_what_one_mesh_wrote_another_reads_and_orbax_is_silent(tmp_path: Path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(OTHER_MESH), str(tmp_path / "a")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("same on every mesh\n", "")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_wherever_it_is(saved: Path):
    files = [path for path in (saved / "model").rglob("*") if path.stat().st_size and path.is_file()]
    assert len(files) > 5
    for path in files:
        flip(path, path.stat().st_size // 2)
        with pytest.raises(DamagedCheckpoint, match="does not have the bytes that were written"):
            checkpoint.read(saved).restore("model")
        flip(path, path.stat().st_size // 2)
    assert len(checkpoint.read(saved).restore("model")) == 4


def test_a_truncated_and_a_missing_file_are_found(saved: Path):
    largest = max((saved / "model").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size - 1)
    with pytest.raises(DamagedCheckpoint, match=r"bytes, \d+ were written"):
        checkpoint.read(saved).restore("model")
    assert len(checkpoint.read(saved).restore("extra")) == 1, "another item is none the worse"
    largest.unlink()
    with pytest.raises(DamagedCheckpoint, match="No such file"):
        checkpoint.read(saved).restore("model")


def test_a_manifest_that_is_missing_broken_edited_or_of_another_checkpoint_is_found(saved: Path, tmp_path: Path):
    manifest = saved / "manifest.json"
    text = manifest.read_text()
    for wrong in (text.replace('"step": 3', '"step": 4'), text[:-1], "[]", ""):
        manifest.write_text(wrong)
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is unusable"):
            checkpoint.read(saved)
    with checkpoint.write(tmp_path / "other", {"step": 3}) as writer:
        writer.add("model", jax.tree.map(lambda a: a + 1, tree()))
    manifest.write_bytes((tmp_path / "other" / "manifest.json").read_bytes())
    with pytest.raises(DamagedCheckpoint, match="saved: model"):
        checkpoint.read(saved).restore("model")
    manifest.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is unusable"):
        checkpoint.read(saved)
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "nowhere")


def test_a_manifest_of_another_format_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    with pytest.raises(DamagedCheckpoint, match="format must be 2, which this program reads, got 1"):
        checkpoint.read(saved)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_nothing_else(
    saved: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"), checkpoint.write(saved, {}) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            writer.add("model", {f"w{i}": np.random.default_rng(i).standard_normal(100_000) for i in range(8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    assert len(checkpoint.read(saved).restore("model")) == 4
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_what_the_disk_has_no_room_for_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=799))
    message = "x needs 800 bytes of disk, 799 are free"
    with pytest.raises(OSError, match=message), checkpoint.write(tmp_path / "a", {}) as writer:
        writer.add("x", {"x": np.ones(100)})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_halfway_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="halfway"), checkpoint.write(tmp_path / "a", {}) as writer:
        writer.add("x", {"x": np.ones(3)})
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_does_not_fit_is_refused_by_name(saved: Path):
    read = checkpoint.read(saved)
    for target, message in [
        ({"x": jax.ShapeDtypeStruct((5,), np.int64)}, r"'x': expected \['int64', \[5\]\] as asked for, got"),
        ({"x": jax.ShapeDtypeStruct((4,), np.float32)}, r"'x': expected \['float32', \[4\]\] as asked for, got"),
        ({"y": jax.ShapeDtypeStruct((4,), np.int64)}, "'x' is in the checkpoint but not in the target"),
        ({"x": np.arange(4), "y": np.arange(4)}, "'y' is in the target but not in the checkpoint"),
    ]:
        with pytest.raises(InputError, match=message):
            read.restore("extra", target)
    with pytest.raises(InputError, match=r"expected one of the items \['model', 'extra'\], got 'optimizer'"):
        read.restore("optimizer")


def test_what_cannot_be_told_apart_or_stored_is_refused(tmp_path: Path):
    with checkpoint.write(tmp_path / "a", {}) as writer:
        writer.add("x", {"x": np.ones(3)})
        for item, tree, message in [
            ("x", {"x": np.ones(3)}, "two entries named 'x'"),
            ("manifest.json", {"x": np.ones(3)}, "two entries named"),
            ("y", {"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "the same path"),
            ("y", {"a": np.ones((2, 0))}, r"'a' has shape \(2, 0\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.add(item, tree)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["content"]["items"].keys() == {"x"}


def test_only_one_process_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        pytest.raises(InputError, match="written by 1 process, got 2"),
        checkpoint.write(tmp_path / "a", {}),
    ):
        pytest.fail("the writer was given out")


def test_a_manifest_with_each_value_replaced_and_its_checksum_made_again(saved: Path):
    """Whoever can write the folder can also write the checksum: what is not damage is still of the right types."""
    path = saved / "manifest.json"
    given = json.loads(path.read_text())["content"]
    del given["items"]["model"]

    def check(case: object) -> None:
        content = json.dumps(case, sort_keys=True)
        path.write_text(json.dumps({"content": case, "sha256": digest(content)}))
        try:
            stored = checkpoint.read(saved)
            for item in stored.items:
                stored.restore(item)
        except DamagedCheckpoint as error:
            raise InputError(str(error)) from error

    cases = [(what, case) for what, case in mutations(given) if "note" not in what]
    assert len(cases) > 200
    wrong = [said for what, case in cases if (said := amiss(what, partial(check, case)))]
    assert not wrong, "\n".join(wrong[:20])
