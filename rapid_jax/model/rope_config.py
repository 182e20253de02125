# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding as a checkpoint's config.json states it: read within limits, and written back."""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from rapid_jax.model.families import Traits
from rapid_jax.runtime.errors import InputError
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
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float | None = None  # of all but default: the context is stretched by this
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_max_positions: int | None = None  # llama3, yarn, longrope: context length before scaling
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin; None = derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] | None = None  # longrope: of each wavelength, in a context as before scaling
    long_factor: tuple[float, ...] | None = None  # longrope: in a longer one
    fraction: float = 1.0  # of a head, its beginning, that is rotated at all


def read_rope(config: Fields, max_positions: int, head_dim: int, traits: Traits) -> Rope:
    """The rotary embedding of a config.json.

    Precedence as in transformers: rope_scaling over rope_parameters, a base inside either over the outer one, an outer
    original context over the inner one. Raises InputError naming a key whose value is no such number, or would make
    angles that are not finite.
    """
    given: Fields = _given(config, traits)
    kind = _kind(given, traits)
    fraction = _fraction(config, given, head_dim, partial=traits.partial)
    theta = traits.theta
    if (stating := _stating("rope_theta", given, config)) is not None:
        theta = stating.number("rope_theta", above=1.0, most=_MOST_THETA)
    if kind == "default":
        return Rope(theta, fraction=fraction)
    if kind == "linear":
        return Rope(theta, "linear", _factor(given, "factor"), fraction=fraction)
    original, places = (max_positions, (config, given)) if traits.original is None else (traits.original, (config,))
    if (stating := _stating("original_max_position_embeddings", *places)) is not None:
        original = stating.whole("original_max_position_embeddings", least=1, most=MOST_POSITIONS)
    if kind == "llama3":
        low, high = _factor(given, "low_freq_factor"), _factor(given, "high_freq_factor")
        if high <= low:
            raise given.error("high_freq_factor", f"above low_freq_factor, which is {low:g}")
        return Rope(theta, "llama3", _factor(given, "factor"), low, high, original, fraction=fraction)
    if kind == "longrope":
        rope = Rope(theta, "longrope", max_positions / original, original_max_positions=original, fraction=fraction)
        return _longrope(given, rope, int(head_dim * fraction) // 2)
    return replace(_yarn(given, theta, max_positions, original), fraction=fraction)


def read_local_rope(config: Fields, traits: Traits) -> Rope | None:
    """That of layers with a window, where they have one of their own: by its base alone."""
    if traits.local_theta is None:
        return None
    none = Fields({}, config.source)
    given = config.fields("rope_parameters", none).fields("sliding_attention", none)
    if _kind(given, traits) != "default":
        raise given.error("rope_type", "default: another rule for layers with a window is not supported")
    if "rope_theta" in given:
        return Rope(given.number("rope_theta", above=1.0, most=_MOST_THETA))
    return Rope(config.number("rope_local_base_freq", traits.local_theta, above=1.0, most=_MOST_THETA))


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
        "short_factor": rope.short_factor and list(rope.short_factor),
        "long_factor": rope.long_factor and list(rope.long_factor),
    }
    return {key: value for key, value in given.items() if value is not None}


def _given(config: Fields, traits: Traits) -> Fields:
    """The keys of a rule, wherever they are: in one object, or in one for each type of layer."""
    none = Fields({}, config.source)
    scaling, parameters = config.fields("rope_scaling", none), config.fields("rope_parameters", none)
    if traits.local_theta is None:
        return scaling or parameters
    if unknown := next((key for key in parameters if key not in ("full_attention", "sliding_attention")), None):
        raise parameters.error(unknown, "part of full_attention or sliding_attention")
    whole = parameters.fields("full_attention", none)
    return Fields(
        {**whole, **scaling}, config.source, "rope_scaling." if scaling else "rope_parameters.full_attention."
    )


def _kind(given: Fields, traits: Traits) -> str:
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
    kind = traits.rope_names.get(kind, kind)
    if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        raise given.error(stated, "default, linear, llama3, yarn or longrope: others are not supported")
    return kind


def _fraction(config: Fields, given: Fields, head_dim: int, *, partial: bool) -> float:
    stating = _stating("partial_rotary_factor", given, config)
    if stating is None:
        return 1.0
    fraction = stating.number("partial_rotary_factor", 1.0, above=0.0, most=1.0)
    if fraction != 1 and not partial:
        raise stating.error("partial_rotary_factor", "1: rotary embedding of a part of the head is not supported")
    if int(head_dim * fraction) < 2 or int(head_dim * fraction) % 2:
        raise stating.error("partial_rotary_factor", f"such that an even part of a head of {head_dim} is rotated")
    return fraction


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


def _longrope(given: Fields, rope: Rope, pairs: int) -> Rope:
    """`rope` with LongRoPE's factors, one for each pair that is rotated."""

    def factors(key: str) -> tuple[float, ...]:
        found = given.numbers(key, most=_MOST_FACTOR)
        if len(found) != pairs or min(found) < _LEAST_FACTOR:
            raise given.error(key, f"{pairs} numbers of at least {_LEAST_FACTOR:g}, one for each pair of a head")
        return tuple(found)

    if rope.original_max_positions == 1:  # whose logarithm is divided by
        raise InputError(f"{given.source}: original_max_position_embeddings must be at least 2 for longrope, got 1")
    return replace(
        rope,
        factor=rope.factor if given.get("factor") is None else _factor(given, "factor"),
        attention_factor=given.number("attention_factor", None, above=0.0, least=_LEAST_FACTOR, most=_MOST_FACTOR),
        short_factor=factors("short_factor"),
        long_factor=factors("long_factor"),
    )
