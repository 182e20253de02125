# SPDX-License-Identifier: Apache-2.0
"""`rapid cache list|clear|verify`: what is kept on disk, how large it is, and whether it is what was written.

Exit status: 1 if something is damaged, 75 if a bucket's store does not answer `verify` now, else as other commands'.
What cannot be read is no damage: it ends `verify` in one line, and nothing is removed.
"""

import argparse
import json
import re
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from rapid_jax.config import RapidConfig
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place, prepare_jax
from rapid_jax.runtime.disk_cache import BOUNDED, KINDS, Entry, entries, remove
from rapid_jax.runtime.errors import InputError, legible, printable
from rapid_jax.runtime.files import cache_dir, cache_place, remove_leftovers
from rapid_jax.runtime.run_folder import again_when_a_store_fails

if TYPE_CHECKING:  # else NumPy would be imported for every command's options
    from rapid_jax.speculative.prefix_bucket import BucketEntry

AnyEntry: TypeAlias = Union[Entry, "BucketEntry"]
_DAMAGED = 1  # exit status
_ZSTD = b"\x28\xb5\x2f\xfd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three commands and their options."""
    commands = parser.add_subparsers(required=True, metavar="list|clear|verify")
    kinds = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
    for name, run, said in (
        ("list", _list, "what is kept: how many entries of each kind, their bytes, when one was last used"),
        ("clear", _clear, "remove everything, or the kinds that are named"),
        ("verify", _verify, "read every entry and name those that are damaged"),
    ):
        command = commands.add_parser(name, help=said, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument(
            "--config", action=Place, as_path=False, reads=True, metavar="FILE", help="settings whose cache is meant"
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "clear":
            command.add_argument("kinds", nargs="*", metavar="KIND", help=kinds)
        if name == "verify":
            command.add_argument("--remove", action="store_true", help="remove what is damaged")


class _Cache:
    """What is kept: in a folder, and of documents' keys and values there or in a bucket."""

    def __init__(self, options: argparse.Namespace):
        from rapid_jax.speculative.prefix_bucket import entries_at

        config = settings.load(RapidConfig, options.config) if options.config else RapidConfig()
        self.root, self.bound = cache_dir(config.cache.folder), int(config.cache.disk_gib * 2**30)
        place = cache_place(config.cache.folder)
        self.prefixes, self.in_bucket = entries_at(place / "prefixes"), not isinstance(place, Path)
        self.said = {"folder": str(self.root)} | ({"prefixes": str(place)} if self.in_bucket else {})
        self.places = [printable(str(self.root)), *([f"prefixes: {printable(str(place))}"] if self.in_bucket else [])]

    def entries(self, kind: str) -> Sequence[AnyEntry]:
        """All of a kind."""
        return self.prefixes.entries() if kind == "prefixes" else entries(self.root, [kind])

    def remove(self, entry: AnyEntry) -> bool:
        """Takes an entry away, whole; False if that is not to be done now."""
        return remove(entry) if isinstance(entry, Entry) else self.prefixes.remove(entry.path.name)

    def has(self, entry: AnyEntry) -> bool:
        """Whether it is still there. Raises InputError where a bucket's store does not say."""
        if isinstance(entry, Entry):
            return entry.path.exists()
        return any(found.path == entry.path for found in self.prefixes.entries())

    def clean(self, kinds: Sequence[str]) -> None:
        """Removes what killed processes have left half written."""
        for kind in kinds:
            if kind == "prefixes":
                self.prefixes.clean()
            else:
                remove_leftovers(self.root / kind)


def _list(options: argparse.Namespace) -> None:
    cache = _Cache(options)
    found = {kind: cache.entries(kind) for kind in KINDS}
    bounded = sum(entry.bytes for kind in BOUNDED for entry in found[kind])
    if options.json:
        kinds = {kind: _count(each) for kind, each in found.items()}
        print(json.dumps(cache.said | {"kinds": kinds, "bytes": bounded, "bound_bytes": cache.bound}))
        return
    rows = [
        (kind, str(len(each)), _size(sum(entry.bytes for entry in each)), _last(each)) for kind, each in found.items()
    ]
    print("\n".join(cache.places))
    _table(("kind", "entries", "size", "last used"), rows)
    apart = "; a bucket and this machine have each this bound" if cache.in_bucket else ""
    print(f"{_size(bounded)} of {_size(cache.bound)} (cache.disk_gib; digests are not counted{apart})")


def _clear(options: argparse.Namespace) -> None:
    if wrong := [kind for kind in options.kinds if kind not in KINDS]:
        raise InputError(f"rapid cache clear: expected {', '.join(KINDS)}, got {printable(wrong[0])}")
    cache = _Cache(options)
    kinds = [kind for kind in KINDS if kind in (options.kinds or KINDS)]
    removed: dict[str, list[AnyEntry]] = {kind: [] for kind in kinds}
    in_use = []
    for entry in [entry for kind in kinds for entry in cache.entries(kind)]:
        (removed[entry.kind] if cache.remove(entry) else in_use).append(entry)
    cache.clean(kinds)
    size = sum(entry.bytes for each in removed.values() for entry in each)
    if options.json:
        counts = {kind: len(each) for kind, each in removed.items()}
        print(json.dumps(cache.said | {"removed": counts, "bytes": size, "kept": _paths(in_use)}))
        return
    counts = ", ".join(f"{len(each)} {kind}" for kind, each in removed.items())
    print(f"removed from {', '.join(cache.places)}: {counts}; {_size(size)}")
    for path in _paths(in_use):
        print(f"kept, in use or not to be removed: {printable(path)}")


def _verify(options: argparse.Namespace) -> int:
    cache = _Cache(options)
    prepare_jax(programs=False)
    checked, faults = dict.fromkeys(KINDS, 0), list[tuple[AnyEntry, str]]()
    with again_when_a_store_fails():
        for entry in [entry for kind in KINDS for entry in cache.entries(kind)]:
            reason = _fault(cache, entry)
            if reason and not cache.has(entry):
                continue  # removed while it was read
            checked[entry.kind] += 1
            if reason:
                faults.append((entry, reason))
    damaged = []
    for entry, reason in faults:  # all were read: what ends the reading removes nothing
        removed = options.remove and cache.remove(entry)
        damaged.append({"kind": entry.kind, "path": str(entry.path), "reason": reason, "removed": removed})
    if options.json:
        print(json.dumps(cache.said | {"checked": checked, "damaged": damaged}))
        return _DAMAGED if damaged else 0
    for item in damaged:
        print(printable(f"damaged{', removed' if item['removed'] else ''}: {item['path']}: {item['reason']}"))
    bad = [item["kind"] for item in damaged]
    _table(("kind", "read", "damaged"), [(kind, str(count), str(bad.count(kind))) for kind, count in checked.items()])
    return _DAMAGED if damaged else 0


def _fault(cache: _Cache, entry: AnyEntry) -> str:
    """What is wrong with an entry; "" for one that is as it was written.

    Raises OSError or InputError where it cannot be read, which is no fault of it.
    """
    if not isinstance(entry, Entry) or entry.kind == "prefixes":
        return _prefix_fault(cache, entry)
    try:
        _CHECKS[entry.kind](entry.path)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError) as error:  # InputError among them
        if (refused := _refusal(error)) is not None:
            raise refused from error
        return legible(str(error))
    return ""


def _prefix_fault(cache: _Cache, entry: AnyEntry) -> str:
    from rapid_jax.runtime.array_store import Damaged
    from rapid_jax.speculative.prefix_check import check_entry

    try:
        with cache.prefixes.reading(entry.path.name):
            check_entry(entry.path)
    except Damaged as error:
        return str(error)
    except (OSError, InputError):
        if cache.has(entry):
            raise
        return "removed while it was read"
    return ""


def _refusal(error: BaseException | None) -> OSError | None:
    """What the system said, if that is why: not that a file is missing."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _check_embeddings(path: Path) -> None:
    from rapid_jax.retrieval.store import read_embeddings

    read_embeddings(path)


def _check_index(path: Path) -> None:
    from rapid_jax.retrieval.index import Index

    Index.load(path)


def _check_program(path: Path) -> None:
    """JAX keeps no checksum: what can be told is whether the file unpacks to its end."""
    data, errors = path.read_bytes(), (zlib.error,)
    unpacking = zlib.decompressobj()
    if data.startswith(_ZSTD):
        try:
            import zstandard
        except ImportError:  # then JAX cannot use the file either, and makes it again
            return
        unpacking, errors = zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError,)
    try:
        unpacking.decompress(data)
    except errors as error:
        raise ValueError(str(error)) from error
    if not unpacking.eof:
        raise ValueError("it ends too early")


def _check_digest(path: Path) -> None:
    if not re.fullmatch(rb"[0-9a-f]{64}", path.read_bytes()):
        raise ValueError("expected 64 hexadecimal digits, got something else")


_CHECKS: dict[str, Callable[[Path], None]] = {
    "embeddings": _check_embeddings,
    "indices": _check_index,
    "programs": _check_program,
    "digests": _check_digest,
}


def _count(found: Sequence[AnyEntry]) -> dict[str, Any]:
    used = max((entry.used for entry in found), default=None)
    return {"entries": len(found), "bytes": sum(entry.bytes for entry in found), "last_used": used}


def _last(found: Sequence[AnyEntry]) -> str:
    if not found:
        return "-"
    return datetime.fromtimestamp(max(entry.used for entry in found)).astimezone().strftime("%Y-%m-%d %H:%M")


def _paths(found: Sequence[AnyEntry]) -> list[str]:
    return [str(entry.path) for entry in found]


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        first, *rest = (
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *rest)).rstrip())
