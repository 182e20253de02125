# SPDX-License-Identifier: Apache-2.0
"""configs/SETTINGS.md, the reference page of all settings, from the dataclasses that they are read into.

python -m tests.settings_page       writes the page anew; tests/test_settings_page.py fails while it is out of date

What a setting means is the comment at its field: beside it, or in the lines right above it.
"""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from longpo_jax.config import LongPOConfig
from rapid_jax.config import RapidConfig

PAGE = Path(__file__).resolve().parents[1] / "configs" / "SETTINGS.md"
HEAD = """\
# Every setting

Made from the dataclasses by `python -m tests.settings_page`; change the comment at the field, not this page.
A file in configs/ names every setting, or names a `base:` and states what differs from it. `--set section.name=value`
overrides one on the command line, and `null` is written `null`. A name or a type that is wrong is refused with the
nearest name that exists.
"""
CHAPTERS = (
    ("`rapid`: files in configs/rapid", RapidConfig),
    ("`longpo`: files in configs/longpo", LongPOConfig),
)
_TYPES = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", types.NoneType: "`null`"}


def page() -> str:
    """The text of configs/SETTINGS.md."""
    return "\n".join([HEAD, *(line for title, cls in CHAPTERS for line in _chapter(title, cls))])


def meanings(cls: type) -> dict[str, str]:
    """What the comment at each field of a dataclass says, by the field's name; empty where there is none."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            its_lines = range(first, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = _phrase(" ".join(comments[line] for line in its_lines if line in comments))
    return found


def _phrase(text: str) -> str:
    """A comment above a field is a sentence, one beside it a phrase: both as a phrase."""
    return (text[:1].lower() + text[1:] if text[1:2].islower() else text).rstrip(".")


def section_of(hint: Any) -> type | None:
    """The dataclass that a field holds, if it is a section."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


def _chapter(title: str, cls: type) -> Iterator[str]:
    hints, instance, said, shown = get_type_hints(cls), cls(), meanings(cls), set()
    own = [field.name for field in dataclasses.fields(cls) if section_of(hints[field.name]) is None]
    yield f"## {title}\n"
    yield from _table(cls, own, "", instance)
    for field in dataclasses.fields(cls):
        section = section_of(hints[field.name])
        if section is None:
            continue
        note = f" {said[field.name][0].upper()}{said[field.name][1:]}." if said[field.name] else ""
        value = getattr(instance, field.name)
        null = " `null` unless the file has it." if value is None else ""
        yield f"### {field.name}\n"
        if section in shown:
            yield f"As `mesh`.{note}{null}\n"
            continue
        shown.add(section)
        yield f"{inspect.cleandoc(section.__doc__ or '')}{note}{null}\n"
        names = [inner.name for inner in dataclasses.fields(section)]
        yield from _table(section, names, f"{field.name}.", section() if value is None else value)


def _table(cls: type, names: list[str], before: str, instance: Any) -> Iterator[str]:
    hints, said = get_type_hints(cls), meanings(cls)
    yield "| setting | value | default | meaning |\n|---|---|---|---|"
    for name in names:
        if section_of(hints[name]):
            value, default = "as `mesh`", ""
        else:
            value, default = _type(hints[name]), f"`{_yaml(getattr(instance, name))}`"
        yield f"| `{before}{name}` | {value} | {default} | {said[name]} |"
    yield ""


def _type(hint: Any) -> str:
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return ", ".join(_type(member) for member in members)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in members)
    return f"list of {_type(members[0])}" if origin in (tuple, list) else _TYPES[hint]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value and "\n" not in value else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
