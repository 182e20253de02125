# SPDX-License-Identifier: Apache-2.0
"""Documents by id: whose they are, when they go, and that a restart, damage or a killed process lose or mix nothing."""

import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rapid_jax.engine import document_files
from rapid_jax.engine.documents import DocumentLibrary, Watch, document_id
from rapid_jax.engine.errors import TooLarge, UnknownDocument
from rapid_jax.runtime.errors import InputError

TEXT = "Ein Fluß\r\nfließt.\n\n\u2028 \U0001f30a"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ids(library: DocumentLibrary, owner: str = "") -> list[str]:
    return [info.id for info in library.all(owner=owner)]


def test_a_document_is_as_it_was_handed_in():
    library = DocumentLibrary(count_tokens=len, clock=Clock())
    info = library.add(TEXT, name="river.txt", pinned=True, expires_in=60)
    assert re.fullmatch("doc-[0-9a-f]{24}", info.id) and info.id == document_id(TEXT)
    assert library.get(info.id) == TEXT
    assert (info.name, info.bytes, info.characters, info.tokens) == ("river.txt", len(TEXT.encode()), len(TEXT), 22)
    assert (info.state, info.pinned, info.public, info.created, info.expires) == ("uploaded", True, False, 1000, 1060)
    assert library.info(info.id) == info and library.all() == [info]


def test_the_same_text_is_the_same_document():
    clock = Clock()
    library = DocumentLibrary(clock=clock)
    first = library.add(TEXT, name="a", pinned=True)
    clock.now += 5
    again = library.add(TEXT, expires_in=10)
    assert (again.id, again.name, again.pinned, again.created, again.expires) == (first.id, "a", True, 1000, 1015)
    assert library.add(TEXT, name="b").name == "b" and library.info(first.id).expires is None
    assert len(library.all()) == 1


def test_another_owners_document_is_unknown():
    library = DocumentLibrary()
    mine = library.add(TEXT, owner="ann")
    theirs = library.add(TEXT, owner="bob")
    assert mine.id != theirs.id and ids(library, "ann") == [mine.id] and library.all() == []
    for ask in (library.get, library.info, library.remove, lambda id, owner: library.pin(id, True, owner=owner)):
        for id in (mine.id, "doc-" + "0" * 24, "", "../../etc/passwd"):
            with pytest.raises(UnknownDocument, match="expected the id of a document of yours"):
                ask(id, owner="bob")
    library.remove(mine.id, owner="ann")
    assert library.all(owner="ann") == [] and library.get(theirs.id, owner="bob") == TEXT


def test_a_public_document_is_everybodys_to_read_and_its_owners_to_change():
    library = DocumentLibrary()
    info = library.add(TEXT, owner="ann", public=True)
    assert info.public and library.get(info.id, owner="bob") == TEXT and library.all(owner="bob") == []
    for change in (library.remove, lambda id, owner: library.pin(id, True, owner=owner)):
        with pytest.raises(UnknownDocument, match="that you handed in"):
            change(info.id, owner="bob")
    assert library.add(TEXT, owner="bob", public=True).id == info.id
    library.remove(info.id, owner="ann")
    assert library.get(info.id, owner="ann") == TEXT and library.all(owner="ann") == []
    library.remove(info.id, owner="bob")
    with pytest.raises(UnknownDocument):
        library.get(info.id, owner="ann")


def test_a_document_expires(tmp_path: Path):
    clock = Clock()
    library = DocumentLibrary(tmp_path, clock=clock)
    short, long = library.add(TEXT, expires_in=10, pinned=True), library.add("other", expires_in=20)
    clock.now += 10
    with pytest.raises(UnknownDocument):
        library.get(short.id)
    with pytest.raises(UnknownDocument):
        library.pin(short.id, pinned=True)
    assert ids(library) == [long.id]
    library.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [f"{long.id}.txt"]
    assert library.add(TEXT).created == 1010


def test_bounds_are_of_each_owner_and_of_all():
    library = DocumentLibrary(most_bytes=100, most_bytes_of_owner=60)
    with pytest.raises(TooLarge, match="expected a text of at most 60 bytes, got 61"):
        library.add("x" * 61, owner="ann")
    first = library.add("ä" * 25, owner="ann")
    library.add("ä" * 25, owner="ann", name="again: it is there")
    with pytest.raises(InputError, match="at most 60 bytes in all, got 11 beside the 50 that are kept: remove some"):
        library.add("x" * 11, owner="ann")
    library.add("x" * 45, owner="bob", public=True)
    with pytest.raises(InputError, match="at most 5 bytes now, got 6"):
        library.add("x" * 6, owner="bob")
    assert library.add("x" * 45, owner="cid", public=True).bytes == 45, "that is there already"
    library.remove(first.id, owner="ann")
    assert library.add("x" * 55, owner="ann").bytes == 55


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": ""}, "got an empty one"),
        ({"text": " \n"}, "got an empty one"),
        ({"text": "a\ud800"}, "half a character at 1"),
        ({"text": "a", "expires_in": 0.0}, "expires_in: expected a number of seconds > 0"),
        ({"text": "a", "expires_in": float("nan")}, "expires_in"),
        ({"text": "a", "expires_in": float("inf")}, "expires_in"),
    ],
)
def test_what_cannot_be_kept_is_said(given, said):
    library = DocumentLibrary()
    with pytest.raises(InputError, match=said):
        library.add(**given)
    assert library.all() == []


def test_the_state_is_what_the_engine_says_and_it_hears_of_pins_and_removals():
    tiers: dict[str, str] = {}
    chunked: set[str] = set()
    told: list[tuple] = []
    watch = Watch(tiers.get, chunked.__contains__, lambda *said: told.append(said), lambda id: told.append((id,)))
    library = DocumentLibrary(watch=watch)
    id = library.add(TEXT, owner="ann", public=True).id
    assert library.info(id).state == "uploaded"
    chunked.add(id)
    assert library.info(id).state == "chunked"
    for tier, state in (("device", "prefilled"), ("host", "on host"), ("disk", "on disk")):
        tiers[id] = tier
        assert library.info(id).state == state
    assert told == [] and not library.is_pinned(id)
    library.pin(id, pinned=True, owner="ann")
    library.add(TEXT, owner="bob", public=True, pinned=True)
    assert told == [(id, True)] and library.is_pinned(id)
    library.remove(id, owner="ann")
    assert told == [(id, True)], "bob's pin is left"
    library.pin(id, pinned=False, owner="bob")
    library.remove(id, owner="bob")
    assert told == [(id, True), (id, False), (id,)] and not library.is_pinned(id)


def test_documents_survive_a_restart(tmp_path: Path):
    clock = Clock()
    library = DocumentLibrary(tmp_path, count_tokens=len, clock=clock)
    library.add(TEXT, owner="ann", name="x\ny", pinned=True, expires_in=60)
    library.add(TEXT, owner="ann", public=True)
    library.add(TEXT, owner="bob", public=True)
    gone = library.add("gone", owner="ann")
    library.remove(gone.id, owner="ann")
    again = DocumentLibrary(tmp_path, clock=clock)
    for owner in ("ann", "bob", ""):
        assert again.all(owner=owner) == library.all(owner=owner)
    assert again.get(document_id(TEXT, "ann"), owner="ann") == TEXT
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_changed_byte_anywhere_is_one_warning_and_the_document_is_gone(tmp_path: Path, caplog):
    library = DocumentLibrary(tmp_path)
    id = library.add(TEXT).id
    path = tmp_path / f"{id}.txt"
    whole = path.read_bytes()
    changed = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    forged = [b"[" * 10_000, b"{}\n", b'{"format": 1}\nx', whole.partition(b"\n")[2].rpartition(b"\n")[0] + b"\n\xff"]
    changed += [document_files.digest(body).encode() + b"\n" + body for body in forged]
    changed += [whole[:size] for size in range(0, len(whole), 7)] + [whole + b"x", b""]
    for data in changed:
        path.write_bytes(data)
        caplog.clear()
        assert DocumentLibrary(tmp_path).all() == []
        assert len(caplog.records) == 1 and "damaged and is dropped" in caplog.text
        assert not path.exists()
    path.write_bytes(whole)
    other = path.with_name(f"doc-{'0' * 24}.txt")
    path.rename(other)
    assert DocumentLibrary(tmp_path).all() == [] and not other.exists()


def test_other_files_in_the_folder_stay(tmp_path: Path):
    for name in ("notes.txt", "doc-1.txt", ".profile"):
        (tmp_path / name).write_text("precious")
    assert DocumentLibrary(tmp_path).all() == []
    assert len(list(tmp_path.iterdir())) == 3


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rapid_jax.engine.documents import DocumentLibrary

    write, folder, text = Path.write_bytes, Path(sys.argv[1]), sys.argv[2]
    library = DocumentLibrary(folder)

    def half(path, data):
        write(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = half
    library.add(text, name="renamed")
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_used(tmp_path: Path, there, caplog):
    text = TEXT * 100
    if there:
        DocumentLibrary(tmp_path).add(text, name="old")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), text],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1 + there
    library = DocumentLibrary(tmp_path)
    assert [info.name for info in library.all()] == ["old"] * there
    assert len(list(tmp_path.iterdir())) == there and not caplog.records


def test_a_full_disk_is_one_warning_and_the_document_is_there(tmp_path: Path, monkeypatch, caplog):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(document_files, "replace_file", full)
    library = DocumentLibrary(tmp_path)
    assert library.get(library.add(TEXT).id) == TEXT
    assert "could not be kept in" in caplog.text and "No space left" in caplog.text


def test_many_threads_lose_nothing(tmp_path: Path):
    library, failures = DocumentLibrary(tmp_path, most_bytes=1 << 20), []

    def work(number: int) -> None:
        owner = f"owner {number % 3}"
        for turn in range(12):
            kept = library.add(f"text {number} {turn}", owner=owner)
            shared = library.add(f"shared {turn}", owner=owner, public=True)
            library.pin(kept.id, pinned=True, owner=owner)
            assert library.get(kept.id, owner=owner) == f"text {number} {turn}"
            assert library.get(shared.id, owner="anybody") == f"shared {turn}"
            assert kept.id in ids(library, owner)
            if turn % 2:
                library.remove(kept.id, owner=owner)

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    again = DocumentLibrary(tmp_path)
    for owner in ("owner 0", "owner 1", "owner 2"):
        assert len(library.all(owner=owner)) == 12 + 12
        assert {info.id for info in again.all(owner=owner)} == set(ids(library, owner))
