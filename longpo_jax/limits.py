# SPDX-License-Identifier: Apache-2.0
"""What a setting may be: each function raises InputError of one line for what it may not. Imports no jax."""

from rapid_jax.runtime.errors import InputError


def require(holds: bool, message: str) -> None:
    """Raises InputError with this message unless it holds."""
    if not holds:
        raise InputError(message)


def require_window(least: int, most: int) -> None:
    """Of min_tokens and max_tokens."""
    require(1 <= least <= most, f"expected 1 <= min_tokens <= max_tokens, got {least} and {most}")


def require_above(least: float, section: object, *names: str, most: float = 1e300) -> None:
    """Of the settings with these names: each is null, or above `least` and at most `most`."""
    for name in names:
        value, limit = getattr(section, name), "" if most == 1e300 else f" and <= {most:g}"
        require(value is None or least < value <= most, f"{name}: expected a number > {least}{limit}, got {value}")


def require_sampling(temperature: float, top_p: float) -> None:
    """Of how answers are drawn; temperature 0 is greedy."""
    good = temperature == 0 or 1e-4 <= temperature <= 1e4
    require(good, f"temperature: expected a number >= 0, 0 or 1e-4 to 1e4, got {temperature}")
    require(0 < top_p <= 1, f"top_p: expected above 0 and at most 1, got {top_p}")
