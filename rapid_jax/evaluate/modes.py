# SPDX-License-Identifier: Apache-2.0
"""Modes as they are asked for: rapid, rapid:eta=5, retrieval:min_tokens=2048, each the run's settings with changes."""

import re
from dataclasses import dataclass, fields
from typing import Any, get_args

from rapid_jax.config import RapidConfig
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import Mode, SamplingConfig, SpeculationConfig

# What the paper calls speculative decoding that changes no law.
_ALIASES = {"sd": "lossless"}
# Sections whose keys may be named alone.
_SHORT = {"speculation": SpeculationConfig, "retrieval": RetrievalConfig, "sampling": SamplingConfig}


@dataclass(frozen=True)
class LabelledMode:
    """A mode by the label that its answers are kept under."""

    label: str  # the mode, and KEY=VALUE of each change, joined by hyphens
    changes: dict[str, Any]  # the changes, "key" or "section.key" as asked for -> value
    config: RapidConfig


def modes_of(asked: str, config: RapidConfig) -> list[LabelledMode]:
    """The modes of a list MODE[:KEY=VALUE...],..., in its order.

    A KEY is a setting, section.key, or the key alone where sections speculation, retrieval or sampling have it. Raises
    InputError for what is no mode or setting, and for one mode twice.
    """
    found: dict[str, LabelledMode] = {}
    for item in asked.split(","):
        name, *changes = (part.strip() for part in item.split(":"))
        mode = _ALIASES.get(name, name)
        if mode not in get_args(Mode):
            known = ", ".join((*get_args(Mode), *_ALIASES))
            raise InputError(f"--modes: expected modes of {known}, with :KEY=VALUE where they differ, got {item!r}")
        overrides = [_override(change, item) for change in changes]
        other = settings.changed(config, [f"speculation.mode={mode}", *overrides], f"--modes: {item}")
        label = re.sub(r"[^\w.=+-]", "_", "-".join((name, *changes)))
        if label in found:
            raise InputError(f"--modes: expected each mode once, got {item!r} again")
        found[label] = LabelledMode(label, dict(_value(change, other) for change in changes), other)
    return list(found.values())


def _override(change: str, item: str) -> str:
    key, equals, value = change.partition("=")
    if not equals:
        raise InputError(f"--modes: expected KEY=VALUE behind a colon, got {change!r} in {item!r}")
    return f"{_full(key)}={value}"


def _full(key: str) -> str:
    if "." in key:
        return key
    sections = [name for name, cls in _SHORT.items() if key in {field.name for field in fields(cls)}]
    return f"{sections[0] if sections else 'speculation'}.{key}"


def _value(change: str, config: RapidConfig) -> tuple[str, Any]:
    """(the key as reports know it, the value that it has come to)."""
    full = _full(change.partition("=")[0])
    value: Any = config
    for name in full.split("."):
        value = getattr(value, name)
    return full.removeprefix("speculation."), value
