# SPDX-License-Identifier: Apache-2.0
"""Values of settings: whether one has the type of its field, and what is said of types and values."""

import math
import types
from typing import Any, Final, Literal, Union, get_args, get_origin

NO_FIT: Final = object()
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def fitted(hint: Any, value: Any) -> Any:
    """`value` as the type `hint` (an int becomes a float, a list a tuple), or `NO_FIT`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        fits = (fitted(member, value) for member in get_args(hint))
        return next((fit for fit in fits if fit is not NO_FIT), NO_FIT)
    if origin is Literal:
        return next((c for c in get_args(hint) if type(c) is type(value) and c == value), NO_FIT)
    if origin in (list, tuple):
        return _fit_items(hint, value)
    if hint is float:
        return _fit_float(value)
    if hint not in _WORDS:
        raise TypeError(f"a settings field cannot have the type {hint!r}")
    return value if type(value) is hint else NO_FIT


def _fit_float(value: Any) -> Any:
    if type(value) not in (int, float):
        return NO_FIT
    try:
        number = float(value)
    except OverflowError:
        return NO_FIT
    return NO_FIT if math.isnan(number) else number


def _fit_items(hint: Any, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return NO_FIT
    members = get_args(hint)
    if get_origin(hint) is list or members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        return NO_FIT
    items = [fitted(member, item) for member, item in zip(members, value, strict=True)]
    return NO_FIT if any(item is NO_FIT for item in items) else get_origin(hint)(items)


def described(hint: Any) -> str:
    """What a value of this type is, for an error."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(member) for member in members)
    if origin is Literal:
        choices = ", ".join(repr(choice) for choice in members)
        return f"one of {choices}" if len(members) > 1 else choices
    if origin is list or (origin is tuple and members[-1] is Ellipsis):
        return f"a list of items that are each {described(members[0])}"
    if origin is tuple:
        return f"a list [{', '.join(described(member) for member in members)}]"
    return _WORDS.get(hint, "a section")


def shown(value: Any) -> str:
    """A value as YAML has it, cut short."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
