# SPDX-License-Identifier: Apache-2.0
"""A sweep: a YAML file that names a base and says which settings are tried.

base: my.yaml                                     settings, beside this file unless the name is absolute
run: runs/rates                                   folder of the sweep, with a folder a point
lists: {optimizer.learning_rate: [1e-5, 2e-5]}    every combination is a point
points: [{seed: 1, pairs.gamma: 4}, {seed: 2}]    or each by itself
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from rapid_jax.runtime import settings, strict_yaml
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.settings_file import base_of, text_of
from rapid_jax.runtime.settings_values import shown
from rapid_jax.runtime.storage import AnyPlace, place_of, working_place

_LONGEST: Final = 100  # bytes of a point's name: file systems take 255, and endings come to it
_PLAIN = re.compile(r"[^\w.,=+-]+")
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """What differs from the base, "section.key" -> value, and the name of its folder, which follows from that."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file states it."""

    source: str
    base: AnyPlace
    run: AnyPlace
    points: tuple[Point, ...]
    more: Mapping[str, Any]  # sections of one command alone

    @property
    def keys(self) -> list[str]:
        """Every setting that some point changes."""
        return list(dict.fromkeys(key for point in self.points for key in point.changes))


def read_sweep(path: str | AnyPlace, more: Iterable[str] = ()) -> SweepFile:
    """The sweep in a file, which may have sections of the names in `more`.

    Raises InputError for a file that cannot be read, and for one that is no sweep.
    """
    place = place_of(path, "sweep")
    tree, source = strict_yaml.parse(text_of(place), str(place)), str(place)
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected a sweep with base, run and lists or points, got {shown(tree)}")
    known = ("base", "run", "lists", "points", *more)
    if unknown := [key for key in tree if key not in known]:
        raise InputError(f"{source}: expected {', '.join(known)}, got {unknown[0]!r}")
    if missing := [key for key in ("base", "run", *more) if key not in tree]:
        raise InputError(f"{source}: expected {missing[0]}, got none")
    if not isinstance(tree["run"], str) or not tree["run"]:
        raise InputError(f"{source}: run: expected the folder of the sweep, got {shown(tree['run'])}")
    if ("lists" in tree) == ("points" in tree):
        raise InputError(f"{source}: expected lists or points, got {'both' if 'lists' in tree else 'neither'}")
    changes = _product(tree["lists"], source) if "lists" in tree else _each(tree["points"], source)
    for key, value in (setting for point in changes for setting in point.items()):
        if not _is_plain(value):
            raise InputError(f"{source}: {key}: expected a value or a list of values, got {shown(value)}")
    points = tuple(map(Point, _names(changes, source), changes))
    run = working_place(tree["run"], f"{source}: run")
    return SweepFile(source, base_of(place, tree["base"]), run, points, {key: tree[key] for key in more})


def settings_of(sweep: SweepFile, cls: type[T], fixed: Iterable[str]) -> dict[str, T]:
    """The settings of each point by its name. Raises InputError for one that does not fit; `fixed` are not swept."""
    base: Any = settings.load(cls, sweep.base)  # type: ignore[type-var]
    if swept := [key for key in sweep.keys if key.partition(".")[0] in fixed]:
        raise InputError(f"{sweep.source}: {swept[0]} is set by the sweep, expected other settings")
    return {
        point.name: settings.replaced(base, point.changes, f"{sweep.source}: {point.name}") for point in sweep.points
    }


def _product(lists: Any, source: str) -> list[dict[str, Any]]:
    if not isinstance(lists, dict) or not lists:
        raise InputError(f"{source}: lists: expected lines 'section.key: [value, ...]', got {shown(lists)}")
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{source}: lists: {key}: expected a list of values, got {shown(values)}")
    return [dict(zip(map(str, lists), values, strict=True)) for values in itertools.product(*lists.values())]


def _each(points: Any, source: str) -> list[dict[str, Any]]:
    if not isinstance(points, list) or not points:
        raise InputError(f"{source}: points: expected a list of 'section.key: value' settings, got {shown(points)}")
    for point in points:
        if not isinstance(point, dict) or not point:
            raise InputError(f"{source}: points: expected settings 'section.key: value', got {shown(point)}")
    return [{str(key): value for key, value in point.items()} for point in points]


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether it is a value of a setting, or lists of such: no mapping, and no list without an end."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, str | int | float)


def _names(changes: list[dict[str, Any]], source: str) -> list[str]:
    """A name a point that says what it changes, by the last parts of its keys where they tell them apart."""
    keys = {key for point in changes for key in point}
    lasts = [key.rpartition(".")[2] for key in keys]
    names, seen = [], set()
    for point in changes:
        whole = json.dumps(point, sort_keys=True)
        if whole in seen:
            raise InputError(f"{source}: expected points that differ, got {shown(point)} twice")
        seen.add(whole)
        parts = []
        for key, value in point.items():
            last = key.rpartition(".")[2]
            parts.append(f"{last if lasts.count(last) == 1 else key}={as_text(value)}")
        name = _PLAIN.sub("-", "_".join(parts))
        if len(name.encode()) > _LONGEST:
            name = f"{name.encode()[: _LONGEST - 9].decode(errors='ignore')}-{digest(whole)[:8]}"
        names.append(name)
    twice = {name for name in names if names.count(name) > 1}
    return [
        f"{name}-{digest(json.dumps(point, sort_keys=True))[:8]}" if name in twice else name
        for name, point in zip(names, changes, strict=True)
    ]


def as_text(value: Any) -> str:
    """A value as it stands in names and tables."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    return value if isinstance(value, str) else shown(value)
