# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all, and hashes do not collide by joining."""

import hashlib
import os
import signal
import subprocess
import sys
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


KILLED = """
import os, pathlib, signal, sys
from rapid_jax.runtime import files
how, path = sys.argv[1], pathlib.Path(sys.argv[2])
if how == "between":  # the old folder is aside, the new one not yet in its place
    rename = pathlib.Path.rename
    def moved(self, target):
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path.rename = moved
with (files.replace_file if how == "file" else files.replace_folder)(path) as temporary:
    (temporary if how == "file" else temporary / "a").write_text("half")
    if how == "alive":
        print("ready", flush=True)
        sys.stdin.readline()
    elif how != "between":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(how: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, how, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path: Path):
    killed("file", tmp_path / "a.txt")
    killed("folder", tmp_path / "export")
    (tmp_path / ".other.0123456789abcdef").write_text("of somebody else")
    assert len(names(tmp_path)) == 3
    with files.replace_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    with files.replace_folder(tmp_path / "export"):
        pass
    assert names(tmp_path) == [".other.0123456789abcdef", "a.txt", "export"]
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a.txt", "export"]
    files.remove_leftovers(tmp_path / "absent")


def test_a_folder_that_was_moved_aside_when_the_process_was_killed_comes_back(tmp_path: Path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").touch()
    killed("between", path)
    assert not path.exists()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint"] and names(path) == ["old"]


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path):
    path = tmp_path / "export"
    command = [sys.executable, "-c", KILLED, "alive", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with files.replace_file(tmp_path / "a.txt") as mine:
            files.remove_leftovers(tmp_path)
            assert mine.exists() and len(names(tmp_path)) == 2
        process.communicate(b"\n")
    assert process.returncode == 0
    assert names(tmp_path) == ["a.txt", "export"] and (path / "a").read_text() == "half"


def test_a_leftover_that_is_removed_before_its_writer_has_locked_it_is_made_again(tmp_path: Path, monkeypatch):
    flock, calls = files.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            files.remove_leftovers(tmp_path)
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.replace_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "whole" and len(calls) == 3


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
NONE = [r"C:\runs\a", "C:/runs", "a:b", "g:/bucket/x", "a/b://c", "1://x", "://x", "runs/a", "", "x y:z"]


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


@pytest.mark.parametrize("place", ["gs:/bucket/x", "S3:/x", "http:/x", "file:/x"])
def test_a_well_known_scheme_with_a_slash_too_few_is_no_path(place):
    with pytest.raises(InputError, match=r"^run: expected a path on this machine"):
        local_path(place, "run")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_no_file_can_be_called_is_refused(name):
    with pytest.raises(InputError, match=r"^run: expected a path, got "):
        local_path(name, "run")
