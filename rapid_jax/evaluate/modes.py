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
    unrelated: bool = False  # what is retrieved comes from another sample's document (the paper's Table 3)


# What a mode may change: models and their places are the run's, the limit of tokens is the sample's.
_MAY_CHANGE = ("speculation.", "retrieval.", "sampling.", "prompts.", "models.max_context", "models.too_long")
_FIXED = ("speculation.mode", "sampling.max_new_tokens")
_UNRELATED = "unrelated"


def modes_of(asked: str, config: RapidConfig) -> list[LabelledMode]:
    """The modes of a list MODE[:KEY=VALUE...],..., in its order.

    A KEY is a setting, section.key, or the key alone where sections speculation, retrieval or sampling have it; the
    word unrelated has no value. Modes target and retrieval decode plainly: lookup is off unless a change says
    otherwise. Raises InputError for what is no mode or no setting that a mode may change, and for one mode twice.
    """
    found: dict[str, LabelledMode] = {}
    for item in asked.split(","):
        name, *changes = (part.strip() for part in item.split(":"))
        mode = _ALIASES.get(name, name)
        if mode not in get_args(Mode):
            known = ", ".join((*get_args(Mode), *_ALIASES))
            raise InputError(f"--modes: expected modes of {known}, with :KEY=VALUE where they differ, got {item!r}")
        values = [change for change in changes if change != _UNRELATED]
        overrides = [
            f"speculation.mode={mode}",
            *(["speculation.lookup=off"] if mode in ("target", "retrieval") else []),
        ]
        try:
            other = settings.changed(config, [*overrides, *(_override(change, item) for change in values)], item)
        except InputError as error:
            raise InputError(f"--modes: {error}") from error
        label = re.sub(r"[^\w.=+-]", "_", "-".join((name, *changes)))
        if label in found:
            raise InputError(f"--modes: expected each mode once, got {item!r} again")
        changed = dict(_value(change, other) for change in values)
        found[label] = LabelledMode(label, changed, other, unrelated=_UNRELATED in changes)
    return list(found.values())


def _override(change: str, item: str) -> str:
    key, equals, value = change.partition("=")
    if not equals:
        raise InputError(f"expected KEY=VALUE or {_UNRELATED} behind a colon, got {change!r} in {item!r}")
    full = _full(key)
    if not full.startswith(_MAY_CHANGE) or full in _FIXED:
        raise InputError(f"expected a setting that a mode may change, got {key!r} in {item!r}")
    return f"{full}={value}"


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
