# SPDX-License-Identifier: Apache-2.0
"""Modes as they are asked for: rapid, rapid:eta=5, retrieval:min_tokens=2048, each the run's settings with changes."""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from rapid_jax.config import RapidConfig
from rapid_jax.evaluate.outcome import FORMER_NAMES
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.speculative.config import Mode, SamplingConfig, SpeculationConfig

LIMIT = "sampling.max_new_tokens"  # of answers: where nobody sets it the samples' own
# Sections whose keys may be named alone.
_SHORT = {"speculation": SpeculationConfig, "retrieval": RetrievalConfig, "sampling": SamplingConfig}


@dataclass(frozen=True)
class LabelledMode:
    """A mode by the label that its answers are kept under."""

    label: str  # the mode, and KEY=VALUE of each change, joined by hyphens
    changes: dict[str, Any]  # the changes, "key" or "section.key" as asked for -> value
    config: RapidConfig
    unrelated: bool = False  # what is retrieved comes from another sample's document (the paper's Table 3)

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, where the mode itself says so."""
        return self.changes.get(LIMIT)


# What a mode may change, which is what `Rapid.with_config` does: models and their places are the run's.
_SECTIONS = ("speculation", "retrieval", "sampling", "prompts")
_SINGLE = ("stop", "models.max_context", "models.too_long")
_FIXED = ("speculation.mode", "retrieval.batch_size")  # the encoder is loaded once
_UNRELATED = "unrelated"
_LONGEST_LABEL = 120  # characters: it is part of a file's name

_log = logging.getLogger(__name__)


def explicit_settings(overrides: Sequence[str]) -> frozenset[str]:
    """The settings that --set names: an evaluation's own defaults stand behind these."""
    return frozenset(override.partition("=")[0] for override in overrides)


def modes_of(asked: str, config: RapidConfig, explicit: Collection[str] = ()) -> list[LabelledMode]:
    """The modes of a list MODE[:KEY=VALUE...],..., in its order.

    A KEY is a setting, section.key, or the key alone where sections speculation, retrieval or sampling have it; the
    word unrelated has no value. Modes target and retrieval decode plainly: lookup is off unless a change says
    otherwise, or `explicit` (the settings that the user named for all modes) has it. Raises InputError for what is no
    mode or no setting that a mode may change, and for one mode twice.
    """
    found: dict[str, LabelledMode] = {}
    for item in asked.split(","):
        name, *changes = (part.strip() for part in item.split(":"))
        mode = FORMER_NAMES.get(name, name)
        if mode not in get_args(Mode):
            known = ", ".join(get_args(Mode))
            raise InputError(f"--modes: expected modes of {known}, with :KEY=VALUE where they differ, got {item!r}")
        if mode != name:
            _log.warning("--modes: %s is called %s now; the next release does not know %s", name, mode, name)
        values = [change for change in changes if change != _UNRELATED]
        plain = mode in ("target", "retrieval") and "speculation.lookup" not in explicit
        overrides = [f"speculation.mode={mode}", *(["speculation.lookup=off"] if plain else [])]
        try:
            other = settings.changed(config, [*overrides, *(_override(change, item) for change in values)], item)
        except InputError as error:
            raise InputError(f"--modes: {error}") from error
        label = _label((mode, *changes))
        if label in found:
            raise InputError(f"--modes: expected each mode once, got {item!r} again")
        changed = {"lookup": "off"} if plain else {}
        changed |= dict(_value(change, other) for change in values)
        found[label] = LabelledMode(label, changed, other, unrelated=_UNRELATED in changes)
    return list(found.values())


def _override(change: str, item: str) -> str:
    key, equals, value = change.partition("=")
    if not equals:
        raise InputError(f"expected KEY=VALUE or {_UNRELATED} behind a colon, got {change!r} in {item!r}")
    full = _full(key)
    section, dot, _ = full.partition(".")
    if full in _FIXED or not (full in _SINGLE or (section in _SECTIONS and dot)):
        known = ", ".join((*(f"{name}.*" for name in _SECTIONS), *_SINGLE))
        raise InputError(f"expected a setting that a mode may change ({known}), got {key!r} in {item!r}")
    return f"{full}={value}"


def _label(parts: Collection[str]) -> str:
    label = re.sub(r"[^\w.=+-]", "_", "-".join(parts))
    return label if len(label.encode()) <= _LONGEST_LABEL else f"{label[:20]}-{digest(label)[:16]}"


def _full(key: str) -> str:
    if "." in key or key in _SINGLE:
        return key
    sections = [name for name, cls in _SHORT.items() if key in {field.name for field in fields(cls)}]
    return f"{sections[0] if sections else 'speculation'}.{key}"


def _value(change: str, config: RapidConfig) -> tuple[str, Any]:
    """(the key as reports know it, the value that it has come to)."""
    full = _full(change.partition("=")[0])
    value: Any = config
    for name in full.split("."):
        value = getattr(value, name)
    return full.removeprefix("speculation."), list(value) if isinstance(value, tuple) else value
