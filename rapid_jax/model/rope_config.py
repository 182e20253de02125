# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding as a checkpoint's config.json states it: read within limits, and written back."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from rapid_jax.runtime.json_input import Fields, shown

MOST_POSITIONS: Final = 2**30  # of a context; a position is an int32
# Beyond these a frequency or an angle in float32 is 0, infinite or not a number.
_MOST_THETA: Final = 1e15
_LEAST_FACTOR, _MOST_FACTOR = 1e-6, 1e6


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and how its frequencies are scaled for longer contexts.

    `scaling` names the rule; the fields below it belong to that rule and are None for the others.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float | None = None  # linear, llama3, yarn: the context is stretched by this
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_max_positions: int | None = None  # llama3, yarn: context length before scaling
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None = derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


def read_rope(config: Fields, max_positions: int, theta: float = 10000.0) -> Rope:
    """The rotary embedding of a config.json; `theta` is the base where it states none.

    Precedence as in transformers: rope_scaling over rope_parameters, a base inside either over the outer one, an outer
    original context over the inner one. Raises InputError naming a key whose value is no such number, or would make
    angles that are not finite.
    """
    none = Fields({}, config.source)
    scaling, parameters = config.fields("rope_scaling", none), config.fields("rope_parameters", none)
    given: Fields = scaling or parameters
    kind = _kind(given)
    for where in (config, given):
        if where.number("partial_rotary_factor", 1.0) != 1:
            raise where.error("partial_rotary_factor", "1: rotary embedding of a part of the head is not supported")
    if (stating := _stating("rope_theta", given, config)) is not None:
        theta = stating.number("rope_theta", above=1.0, most=_MOST_THETA)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", _factor(given, "factor"))
    original = max_positions
    if (stating := _stating("original_max_position_embeddings", config, given)) is not None:
        original = stating.whole("original_max_position_embeddings", least=1, most=MOST_POSITIONS)
    if kind == "llama3":
        low, high = _factor(given, "low_freq_factor"), _factor(given, "high_freq_factor")
        if high <= low:
            raise given.error("high_freq_factor", f"above low_freq_factor, which is {low:g}")
        return Rope(theta, "llama3", _factor(given, "factor"), low, high, original)
    return _yarn(given, theta, max_positions, original)


def rope_scaling(rope: Rope) -> dict[str, Any] | None:
    """The rule as config.json's rope_scaling, which holds everything of a `Rope` but its base; None for no rule."""
    if rope.scaling == "default":
        return None
    given: dict[str, Any] = {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": None if rope.truncate else False,
    }
    return {key: value for key, value in given.items() if value is not None}


def _kind(given: Fields) -> str:
    """The rule's name. Without one there must be no number of a rule either: nobody could say what it was meant for."""
    for key, value in given.items():
        if isinstance(value, dict):
            raise given.error(key, "a number or a string: rotary embedding that differs by layer is not supported")
    stated = next((key for key in ("rope_type", "type") if key in given), None)
    if stated is None:
        if given.keys() - {"rope_theta", "partial_rotary_factor"}:
            raise given.error("rope_type", f"there beside {', '.join(sorted(map(shown, given)))}")
        return "default"
    kind = given.text(stated)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise given.error(stated, "default, linear, llama3 or yarn: others are not supported")
    return kind


def _stating(key: str, *where: Fields) -> Fields | None:
    """The first that has the key, were it null: transformers has no default for a null then."""
    return next((fields for fields in where if key in fields), None)


def _factor(given: Fields, key: str) -> float:
    return given.number(key, above=0.0, least=_LEAST_FACTOR, most=_MOST_FACTOR)


def _yarn(given: Fields, theta: float, max_positions: int, original: int) -> Rope:
    if "factor" not in given:
        raise given.error("factor", "a number, or null for the ratio of the two contexts")
    factor = max_positions / original if given["factor"] is None else _factor(given, "factor")
    if max(factor * original, 1 / factor) > MOST_POSITIONS:
        raise given.error("factor", f"such that the context has at most {MOST_POSITIONS} positions")
    limits = {"above": 0.0, "least": _LEAST_FACTOR, "most": _MOST_FACTOR}
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=given.number("beta_fast", 32.0, **limits),
        beta_slow=given.number("beta_slow", 1.0, **limits),
        attention_factor=given.number("attention_factor", None, **limits),
        mscale=given.number("mscale", None, least=0.0, most=_MOST_FACTOR),
        mscale_all_dim=given.number("mscale_all_dim", None, least=0.0, most=_MOST_FACTOR),
        truncate=given.truth("truncate") if "truncate" in given else True,
    )
