# SPDX-License-Identifier: Apache-2.0
"""The files that the sources of a corpus name: regular ones, that lie in the folder of their source."""

import functools
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, full_name, place_of

TEXT, LINES, PACKED = (".txt", ".md", ".tex"), ".jsonl", (".gz", ".zst")
_KINDS = "a .txt, .md, .tex or .jsonl file (or one of those with .gz or .zst)"
_OTHER = "file of another kind"
_LINK = "link that leads out of its source's folder (corpus.follow_links)"


@dataclass(frozen=True)
class File:
    """A file of texts; `name` is DOMAIN/FILE, file below the folder of the source."""

    name: str
    domain: str
    path: AnyPlace


def files_of(sources: Sequence[str], dropped: Counter[str], *, follow_links: bool = False) -> list[File]:
    """Every file of the sources (DOMAIN=FOLDER, DOMAIN=GLOB) in the order of their names; hidden ones are passed over.

    Files of other kinds, pipes and the like, and links that lead out of a source's folder unless they are followed, are
    counted in `dropped`. Raises InputError for no source, one without a file, and two files of one name.
    """
    if not sources:
        raise InputError("corpus.sources: expected DOMAIN=FOLDER or DOMAIN=GLOB, got none")
    found: dict[str, File] = {}
    for source in sources:
        domain, _, place = source.partition("=")
        left_out: Counter[str] = Counter()
        known = _files_at(place_of(place, "corpus.sources"), follow_links, left_out)
        if not known:
            reasons = "".join(f", {count} x {reason}" for reason, count in left_out.items())
            raise InputError(f"corpus.sources: {source}: expected {_KINDS} there, found none{reasons}")
        dropped.update(left_out)
        for name, path in known.items():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"corpus.sources: {source}: expected names in UTF-8, got {name!a}") from error
            file = File(f"{domain}/{name}", domain, path)
            other = found.setdefault(file.name, file).path
            if full_name(other) != full_name(path):
                raise InputError(f"corpus.sources: {other} and {path} are both {file.name}: name the domains apart")
    return [found[name] for name in sorted(found)]


def suffix_of(path: AnyPlace) -> str:
    """What is in a file, by its name without the suffix of its compression: ".txt" for a.TXT.gz."""
    bare = PurePath(path.name)
    return (bare.with_suffix("") if bare.suffix.lower() in PACKED else bare).suffix.lower()


def _files_at(place: AnyPlace, follow_links: bool, left_out: Counter[str]) -> Mapping[str, AnyPlace]:
    """The files of texts that a source names, by their names below the folder that holds them all."""
    if isinstance(place, Path):
        return _Place(place, follow_links, left_out).files()
    root, pattern = place, ()
    if not place.exists():
        parts = PurePath(place.key).parts
        at = next((index for index, part in enumerate(parts) if _is_pattern(part)), len(parts) - 1)
        for _ in parts[at:]:
            root = root.parent
        pattern = parts[at:]
    found = [place] if place.is_file() else root.below()
    names = {(PurePath(file.name) if file == place else file.relative_to(root)): file for file in found}
    known: dict[str, AnyPlace] = {}
    for name, file in names.items():
        if not any(part.startswith(".") for part in name.parts) and (not pattern or _fits(name.parts, pattern)):
            if suffix_of(file) in (*TEXT, LINES):
                known[name.as_posix()] = file
            else:
                left_out[_OTHER] += 1
    return known


def _is_pattern(part: str) -> bool:
    return re.search(r"[*?[]", part) is not None


class _Place:
    """A folder, a file or a pattern that a source names; what is not taken there is counted in `left_out`."""

    def __init__(self, place: Path, follow_links: bool, left_out: Counter[str]):
        self._place, self._follow, self._left_out = place, follow_links, left_out
        self._named = os.path.exists(place)
        if self._named:
            self._root = place if place.is_dir() else place.parent
        else:
            parts = [index for index, part in enumerate(place.parts) if _is_pattern(part)]
            self._root = Path(*place.parts[: parts[0]]) if parts else place.parent
        self._real = functools.cache(os.path.realpath)  # of folders

    def files(self) -> dict[str, Path]:
        """The files of texts by their names below the folder that holds them all."""
        found = {}
        for path in [self._place] if self._named else self._matches():
            for file in self._below(path) if os.path.isdir(path) else [path]:
                if self._is_taken(file):
                    found[file.relative_to(self._root).as_posix()] = file
        return found

    def _matches(self) -> Iterator[Path]:
        """What the pattern matches. `**` is walked here: glob would follow links in circles."""
        parts = self._place.parts
        at = parts.index("**") if "**" in parts else len(parts)
        for match in glob.iglob(str(Path(*parts[:at]))):
            if at == len(parts):
                yield Path(match)
            else:
                yield from (
                    path for path in self._below(Path(match)) if _fits(path.relative_to(match).parts, parts[at:])
                )

    def _below(self, folder: Path) -> Iterator[Path]:
        """All files but the hidden ones, in links to folders, too, if links are followed."""
        if not self._is_inside(folder):
            self._left_out[_LINK] += 1
            return
        seen = set()
        for path, folders, names in os.walk(folder, followlinks=self._follow):
            real = os.path.realpath(path)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:
                yield from (Path(path, name) for name in names if not name.startswith("."))
            seen.add(real)
            # A link to a folder inside is passed over: the folder is walked where it is.
            if outside := sum(not self._is_inside(Path(path, name)) for name in folders):
                self._left_out[_LINK] += outside

    def _is_inside(self, path: Path) -> bool:
        """Whether a file or folder is in the source's folder, or links are followed anywhere."""
        if self._follow or (self._named and path == self._place):
            return True
        root = Path(self._real(self._root))
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(self._real(path.parent), path.name)
        return Path(real).is_relative_to(root)

    def _is_taken(self, path: Path) -> bool:
        if suffix_of(path) not in (*TEXT, LINES):
            self._left_out[_OTHER] += 1
        elif not self._is_inside(path):
            self._left_out[_LINK] += 1
        elif not _may_be_regular(path):
            self._left_out["pipe, device or socket"] += 1
        else:
            return True
        return False


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path, or a folder that it lies in, matches the pattern, whose `**` stands for any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_fits(parts[at:], pattern[1:]) for at in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _may_be_regular(path: Path) -> bool:
    """Whether it is a regular file, or one that cannot be looked at: reading it says why."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True
