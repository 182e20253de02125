# SPDX-License-Identifier: Apache-2.0
"""Settings files: the text of one, and those it is based on.

`base: FILE` at the top of a file names another, beside the file that names it unless the name is absolute (or gs://, s3://):
what the file states takes the place of the same settings there, section by section, and all else is the base's. A base
may have a base.
"""

import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rapid_jax.runtime import strict_yaml
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, is_local, place_of

BASE: Final = "base"


@dataclass(frozen=True)
class SettingsFile:
    """What one file states, without its base."""

    source: str
    tree: Any


def read_chain(path: str | AnyPlace) -> list[SettingsFile]:
    """The file, its base, the base's base and so on. Raises InputError for one that cannot be read, and for a loop."""
    place, chain, seen = place_of(path, "settings"), [], []
    while True:
        here = _identity(place)
        if here in seen:
            raise InputError(f"{path}: base: expected files that end in one without a base, got a loop back to {place}")
        seen.append(here)
        by = f" (the base of {chain[-1].source}, looked for beside it)" if chain else ""
        tree = strict_yaml.parse(text_of(place, by), str(place))
        if not isinstance(tree, dict) or BASE not in tree:
            return [*chain, SettingsFile(str(place), tree)]
        chain.append(SettingsFile(str(place), {key: value for key, value in tree.items() if key != BASE}))
        place = base_of(place, tree[BASE])


def merged(chain: list[SettingsFile]) -> Any:
    """One tree of all that the files state; the first has the last word."""
    tree = chain[-1].tree
    for file in reversed(chain[:-1]):
        tree = _over(tree, file.tree)
    return tree


def _over(below: Any, above: Any) -> Any:
    """`above` put over `below`: sections are joined, a value or a list is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _over(below[key], value) if key in below else value for key, value in above.items()}


def base_of(place: AnyPlace, name: Any) -> AnyPlace:
    """The file that the file at `place` names as its base."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{place}: {BASE}: expected the name of a settings file, got {name!r}")
    what = f"{place}: {BASE}"
    if not is_local(name) or name.startswith(("/", "~")):
        return place_of(name, what)
    if isinstance(place, Path):
        return place.parent / name
    return place_of(
        f"{place.scheme}://{place.bucket}/{posixpath.normpath(posixpath.join(place.parent.key, name))}", what
    )


def _identity(place: AnyPlace) -> str:
    return str(place.resolve() if isinstance(place, Path) else place)


def text_of(place: AnyPlace, by: str = "") -> str:
    """The text of a file of settings. Raises InputError, which ends in `by`, where it cannot be read."""
    try:
        return place.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{place}: cannot be read: {error.strerror}{by}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: expected UTF-8 text, got other bytes at offset {error.start}{by}") from error
