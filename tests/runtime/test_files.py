# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all, and hashes do not collide by joining."""

import hashlib
import os
from pathlib import Path

import pytest

from rapid_jax.runtime import files
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import local_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_on_a_clean_exit(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with files.replace_file(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), files.replace_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path: Path):
    plain_file, plain_folder = tmp_path / "plain.txt", tmp_path / "plain"
    plain_file.touch()
    plain_folder.mkdir()
    with files.replace_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    with files.replace_folder(tmp_path / "a") as temporary:
        (temporary / "b").touch()
    assert (tmp_path / "a.txt").stat().st_mode == plain_file.stat().st_mode
    assert (tmp_path / "a").stat().st_mode == plain_folder.stat().st_mode


def test_a_folder_is_replaced_on_a_clean_exit(tmp_path: Path):
    path = tmp_path / "checkpoint"
    for name in ("one", "two"):
        with files.replace_folder(path) as temporary:
            (temporary / name).touch()
        assert names(path) == [name]
    assert names(tmp_path) == ["checkpoint"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(RuntimeError, match="halfway"), files.replace_folder(path) as temporary:
        (temporary / "new").touch()
        raise RuntimeError("halfway")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_move_in(tmp_path: Path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(FileNotFoundError), files.replace_folder(path) as temporary:
        temporary.rmdir()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("kept")
    with pytest.raises(InputError, match="expected a folder or nothing there, got a file"), files.replace_folder(path):
        pytest.fail("the folder was given out to be written")
    assert path.read_text() == "kept"


def test_digest_separates_its_parts():
    digests = [files.digest(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ()]]
    assert len(set(digests)) == len(digests)
    assert files.digest("é") == files.digest("é".encode())
    one = (2).to_bytes(8, "little") + b"ab"
    assert files.digest("ab") == hashlib.sha256(one).hexdigest()


def test_digest_of_a_file_is_the_sha256_of_its_bytes(tmp_path: Path):
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    assert files.digest_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_the_cache_folder_follows_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAPID_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.default_cache_dir() == tmp_path / ".cache" / "rapid_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert files.default_cache_dir() == Path("/xdg/rapid_jax")
    monkeypatch.setenv("RAPID_JAX_CACHE", "~/mine")
    assert files.default_cache_dir() == tmp_path / "mine"


SCHEMES = ["gs://bucket/x", "s3://b", "http://h/x", "https://h", "file:///x", "GS://b", " gs://b", "hf://a/b"]
NONE = [r"C:\runs\a", "C:/runs", "a:b", "gs:/bucket/x", "a/b://c", "1://x", "://x", "runs/a", "", "x y:z"]


@pytest.mark.parametrize("text", SCHEMES)
def test_a_place_with_a_scheme_is_no_path(text):
    with pytest.raises(InputError, match=r"^run: expected a path on this machine, got ") as error:
        local_path(text, "run")
    assert "://" in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("text", NONE)
def test_other_names_with_a_colon_are_paths(text):
    assert local_path(text, "run") == Path(text)
    assert local_path("~/x", "run") == Path.home() / "x"


def test_the_user_of_a_home_folder_must_be_there():
    with pytest.raises(InputError, match=r"^run: expected a path, got '~nobody-of-that-name/x'"):
        local_path("~nobody-of-that-name/x", "run")
