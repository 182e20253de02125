# SPDX-License-Identifier: Apache-2.0
"""Settings: strict YAML to nested frozen dataclasses and back.

A settings class is a dataclass whose fields are dataclasses (sections) or plain values: int, float, str, bool, None,
`Literal[...]`, unions of those, and list or tuple of those. A settings file names every field of its class: what ran
can be read off the file alone, and a default that changes in the code changes no old experiment. A field declared with
`field(metadata={"optional": True})` may be left out and then takes its default; one declared with {"was": "name"} is
what is hinted at where a file still says that name.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rapid_jax.runtime import strict_yaml
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.storage import AnyPlace, place_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_NO_FIT = object()
_ALIKE = 0.7  # how much of a name must agree before it is hinted at
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def load(cls: type[T], path: str | AnyPlace, overrides: Sequence[str] = ()) -> T:
    """The settings in the YAML file `path` with `overrides` ("section.key=value", the later wins) put over them.

    Raises InputError, naming the file and the setting, for whatever does not fit `cls`: an unknown key (with the
    nearest valid one), a missing key, a value of another type, a duplicate key, bad YAML (with the line), or what
    `cls` itself refuses.
    """
    try:
        text = place_of(path, "settings").read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got other bytes at offset {error.start}") from error
    return _assemble(cls, strict_yaml.parse(text, str(path)), str(path), overrides)


def defaults(cls: type[T], overrides: Sequence[str] = ()) -> T:
    """The settings that the defaults of `cls` and of its sections make, with `overrides` put over them.

    Raises InputError as `load` does; a field without a default must then come from `overrides`.
    """
    return _assemble(cls, _default_tree(cls), "default settings", overrides)


def changed(settings: T, overrides: Sequence[str], source: str) -> T:
    """`settings`, which are called `source`, with `overrides` put over them. Raises InputError as `load` does."""
    return _assemble(type(settings), _tree_of(settings), source, overrides)


def dump(settings: "DataclassInstance") -> str:
    """YAML text with every field of `settings`, which `load` reads back to an equal instance."""
    return strict_yaml.emit(_tree_of(settings))


def flat(settings: "DataclassInstance") -> dict[str, Any]:
    """Every setting, "section.key" -> value, in the order of the settings file; a section that is null as one value."""
    found: dict[str, Any] = {}
    for name, value in dataclasses.asdict(settings).items():
        found |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return found


def save(settings: "DataclassInstance", path: AnyPlace) -> None:
    """Writes `dump(settings)` to `path`, whole or not at all."""
    text = dump(settings)
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _assemble(cls: type[T], tree: Any, source: str, overrides: Sequence[str]) -> T:
    for override in overrides:
        tree = _override(cls, tree, override)
    if overrides:
        source = f"{source} with " + " ".join(f"--set {override}" for override in overrides)
    return _build(cls, tree, source, (), cls)


def _override(cls: type, tree: Any, override: str) -> Any:
    """`tree` with one "section.key=value" put into it, checked on its own so that a mistake names the override."""
    source = f"--set {override}"
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise InputError(f"{source}: expected section.key=value")
    hint: Any = cls
    for depth, key in enumerate(keys):
        section = _section(hint)
        if section is None:
            raise InputError(f"{source}: {'.'.join(keys[:depth])!r} is a value and has no settings below it")
        known = _hints(section)
        if key not in known:
            raise InputError(_unknown(cls, source, keys[:depth], key, keys[-1]))
        hint = known[key]
    value = strict_yaml.parse(text, source)
    section = _section(hint)
    if section is not None and not (value is None and _admits_none(hint)):
        raise InputError(f"{source}: {name!r} is a section: set one of its settings ({', '.join(_hints(section))})")
    return _put(tree, keys, _read(hint, value, source, keys, cls))


def _put(tree: Any, keys: tuple[str, ...], value: Any) -> Any:
    if not keys:
        return value
    if tree is not None and not isinstance(tree, dict):
        return tree  # not a section in the file: _build says so
    branch = tree or {}
    return branch | {keys[0]: _put(branch.get(keys[0]), keys[1:], value)}


def _build(cls: type[T], tree: Any, source: str, keys: tuple[str, ...], root: type) -> T:
    place = f"{source}: {'.'.join(keys)}" if keys else source
    if not isinstance(tree, dict):
        raise InputError(f"{place}: expected a section of 'key: value' lines, got {_show(tree)}")
    known = _hints(cls)
    for key in tree:
        if key not in known:
            inner = next(iter(tree[key]), key) if isinstance(tree[key], dict) else key
            raise InputError(_unknown(root, source, keys, key, inner))
    missing = [field.name for field in _fields(cls) if field.name not in tree and not field.metadata.get("optional")]
    if missing:
        names = ", ".join(repr(".".join((*keys, name))) for name in missing)
        raise InputError(f"{source}: missing {'setting' if len(missing) == 1 else 'settings'} {names}")
    values = {name: _read(known[name], value, source, (*keys, name), root) for name, value in tree.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _read(hint: Any, value: Any, source: str, keys: tuple[str, ...], root: type) -> Any:
    section = _section(hint)
    if section is not None:
        return None if value is None and _admits_none(hint) else _build(section, value, source, keys, root)
    fitted = _fit(hint, value)
    if fitted is _NO_FIT:
        raise InputError(f"{source}: {'.'.join(keys)}: expected {_describe(hint)}, got {_show(value)}")
    return fitted


def _fit(hint: Any, value: Any) -> Any:
    """`value` as the type `hint` (an int becomes a float, a list a tuple), or `_NO_FIT`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        fits = (_fit(member, value) for member in get_args(hint))
        return next((fitted for fitted in fits if fitted is not _NO_FIT), _NO_FIT)
    if origin is Literal:
        return next((c for c in get_args(hint) if type(c) is type(value) and c == value), _NO_FIT)
    if origin in (list, tuple):
        return _fit_items(hint, value)
    if hint is float:
        return _fit_float(value)
    if hint not in _WORDS:
        raise TypeError(f"a settings field cannot have the type {hint!r}")
    return value if type(value) is hint else _NO_FIT


def _fit_float(value: Any) -> Any:
    if type(value) not in (int, float):
        return _NO_FIT
    try:
        number = float(value)
    except OverflowError:
        return _NO_FIT
    return _NO_FIT if math.isnan(number) else number


def _fit_items(hint: Any, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _NO_FIT
    members = get_args(hint)
    if get_origin(hint) is list or members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        return _NO_FIT
    items = [_fit(member, item) for member, item in zip(members, value, strict=True)]
    return _NO_FIT if any(item is _NO_FIT for item in items) else get_origin(hint)(items)


def _describe(hint: Any) -> str:
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in members)
    if origin is Literal:
        choices = ", ".join(repr(choice) for choice in members)
        return f"one of {choices}" if len(members) > 1 else choices
    if origin is list or (origin is tuple and members[-1] is Ellipsis):
        return f"a list of items that are each {_describe(members[0])}"
    if origin is tuple:
        return f"a list [{', '.join(_describe(member) for member in members)}]"
    return _WORDS.get(hint, "a section")


def _unknown(root: type, source: str, keys: tuple[str, ...], key: Any, last: Any) -> str:
    """The error of a key that `root` does not have below `keys`; `last` is the setting that was meant there."""
    where = f" in {'.'.join(keys)!r}" if keys else ""
    likely = _likely(root, keys, str(key), str(last))
    hint = f"; did you mean {' or '.join(map(repr, likely))}?" if likely else ""
    return f"{source}: unknown setting {str(key)!r}{where}{hint}"


def _likely(root: type, keys: tuple[str, ...], key: str, last: str) -> list[str]:
    """What may have been meant: a key beside that looks so or begins so, else the places of a setting of that name.

    A name is known by its initials too (lr: learning_rate). What looks like nothing has no hint.
    """
    cls: type = root
    for name in keys:
        cls = _section(_hints(cls)[name]) or cls
    renamed = [field.name for field in _fields(cls) if field.metadata.get("was") == key]
    beside = renamed or difflib.get_close_matches(key, _hints(cls), n=1, cutoff=_ALIKE)
    beside = beside or [name for name in _hints(cls) if name.startswith(f"{key}_")][:1]
    if beside:
        return beside
    places = list(_paths(root))
    for same in (lambda name: name == last, lambda name: "".join(part[:1] for part in name.split("_")) == last):
        found = [place for place in places if same(place.rpartition(".")[2])]
        if found:
            return found[:3]
    names = difflib.get_close_matches(last, {place.rpartition(".")[2] for place in places}, n=1, cutoff=_ALIKE)
    return [place for place in places if names and place.rpartition(".")[2] == names[0]][:3]


def _paths(cls: type, before: str = "") -> Iterator[str]:
    """The full name of every setting."""
    for name, hint in _hints(cls).items():
        section = _section(hint)
        if section is None:
            yield before + name
        else:
            yield from _paths(section, f"{before}{name}.")


def _fields(cls: type) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(cls) if field.init)


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in _fields(cls)}


def _section(hint: Any) -> type | None:
    """The dataclass that `hint` is or admits, else None."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)), None)


def _admits_none(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _default_tree(cls: type) -> dict[str, Any]:
    tree = {}
    hints = _hints(cls)
    for field in _fields(cls):
        if field.default is not dataclasses.MISSING:
            tree[field.name] = _tree_of(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = _tree_of(field.default_factory())
        elif dataclasses.is_dataclass(hints[field.name]):
            tree[field.name] = _default_tree(hints[field.name])
    return tree


def _tree_of(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _tree_of(getattr(value, field.name)) for field in _fields(type(value))}
    if isinstance(value, list | tuple):
        return [_tree_of(item) for item in value]
    return value


def _show(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
