# SPDX-License-Identifier: Apache-2.0
"""Settings: strict YAML to nested frozen dataclasses and back.

A settings class is a dataclass whose fields are dataclasses (sections) or plain values: int, float, str, bool, None,
`Literal[...]`, unions of those, and list or tuple of those. A settings file names every field of its class: what ran
can be read off the file alone, and a default that changes in the code changes no old experiment. A field declared with
`field(metadata={"optional": True})` may be left out and then takes its default; one declared with {"was": "name"} is
what is hinted at where a file still says that name. A file with a base (settings_file.py) states what differs from it.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rapid_jax.runtime import strict_yaml
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.settings_file import merged, read_chain
from rapid_jax.runtime.settings_values import NO_FIT, described, fitted, shown
from rapid_jax.runtime.storage import AnyPlace

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_ALIKE = 0.7  # how much of a name must agree before it is hinted at


def load(cls: type[T], path: str | AnyPlace, overrides: Sequence[str] = ()) -> T:
    """The settings in the YAML file `path`, over those of its base if it names one, with `overrides` put over them.

    An override is "section.key=value", the later wins. Raises InputError, naming the file and the setting, for whatever
    does not fit `cls`: an unknown key (with the nearest valid one), a missing key, a value of another type, a duplicate
    key, bad YAML (with the line), or what `cls` itself refuses.
    """
    file, *bases = chain = read_chain(path)
    for part in chain if bases else ():  # a mistake names the file that it is in
        _check_part(cls, part.tree, part.source, (), cls)
    source = f"{file.source} (base {', '.join(base.source for base in bases)})" if bases else file.source
    return _assemble(cls, merged(chain), source, overrides)


def defaults(cls: type[T], overrides: Sequence[str] = ()) -> T:
    """The settings that the defaults of `cls` and of its sections make, with `overrides` put over them.

    Raises InputError as `load` does; a field without a default must then come from `overrides`.
    """
    return _assemble(cls, _default_tree(cls), "default settings", overrides)


def changed(settings: T, overrides: Sequence[str], source: str) -> T:
    """`settings`, which are called `source`, with `overrides` put over them. Raises InputError as `load` does."""
    return _assemble(type(settings), _tree_of(settings), source, overrides)


def replaced(settings: T, values: Mapping[str, Any], source: str) -> T:
    """`settings` with plain values, "section.key" -> value, put over them; errors name `source`, as `load`'s do."""
    tree = _tree_of(settings)
    for name, value in values.items():
        tree = _put_value(type(settings), tree, name, value, source)
    return _build(type(settings), tree, source, (), type(settings))


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
    """`tree` with one "section.key=value" put into it; a mistake names the override."""
    source = f"--set {override}"
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise InputError(f"{source}: expected section.key=value")
    return _put_value(cls, tree, name, strict_yaml.parse(text, source), source)


def _put_value(cls: type, tree: Any, name: str, value: Any, source: str) -> Any:
    """`tree` with the setting of that name put into it, checked on its own."""
    keys = tuple(name.split("."))
    hint: Any = cls
    for depth, key in enumerate(keys):
        section = _section(hint)
        if section is None:
            raise InputError(f"{source}: {'.'.join(keys[:depth])!r} is a value and has no settings below it")
        known = _hints(section)
        if key not in known:
            raise InputError(_unknown(cls, source, keys[:depth], key, keys[-1]))
        hint = known[key]
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
    place, known = _named(source, keys), _known(cls, tree, source, keys, root)
    missing = [field.name for field in _fields(cls) if field.name not in tree and not field.metadata.get("optional")]
    if missing:
        names = ", ".join(repr(".".join((*keys, name))) for name in missing)
        raise InputError(f"{source}: missing {'setting' if len(missing) == 1 else 'settings'} {names}")
    values = {name: _read(known[name], value, source, (*keys, name), root) for name, value in tree.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _check_part(cls: type, tree: Any, source: str, keys: tuple[str, ...], root: type) -> None:
    """Raises InputError for a key or a value that does not fit `cls`; settings may be missing."""
    for name, hint in _known(cls, tree, source, keys, root).items():
        if name not in tree:
            continue
        section = _section(hint)
        if section is not None and isinstance(tree[name], dict):
            _check_part(section, tree[name], source, (*keys, name), root)
        else:
            _read(hint, tree[name], source, (*keys, name), root)


def _known(cls: type, tree: Any, source: str, keys: tuple[str, ...], root: type) -> dict[str, Any]:
    """The types of the fields of `cls`. Raises InputError unless `tree` is a section with some of them alone."""
    if not isinstance(tree, dict):
        raise InputError(f"{_named(source, keys)}: expected a section of 'key: value' lines, got {shown(tree)}")
    known = _hints(cls)
    for key in tree:
        if key not in known:
            inner = next(iter(tree[key]), key) if isinstance(tree[key], dict) else key
            raise InputError(_unknown(root, source, keys, key, inner))
    return known


def _named(source: str, keys: tuple[str, ...]) -> str:
    return f"{source}: {'.'.join(keys)}" if keys else source


def _read(hint: Any, value: Any, source: str, keys: tuple[str, ...], root: type) -> Any:
    section = _section(hint)
    if section is not None:
        return None if value is None and _admits_none(hint) else _build(section, value, source, keys, root)
    fit = fitted(hint, value)
    if fit is NO_FIT:
        raise InputError(f"{source}: {'.'.join(keys)}: expected {described(hint)}, got {shown(value)}")
    return fit


def _unknown(root: type, source: str, keys: tuple[str, ...], key: Any, last: Any) -> str:
    """The error of a key that `root` does not have below `keys`; `last` is the setting that was meant there."""
    where = f" in {'.'.join(keys)!r}" if keys else ""
    likely = _likely(root, keys, str(key), str(last))
    hint = f"; did you mean {' or '.join(map(repr, likely))}?" if likely else ""
    return f"{source}: unknown setting {str(key)!r}{where}{hint}"


def _likely(root: type, keys: tuple[str, ...], key: str, last: str) -> list[str]:
    """What may have been meant: the places of a setting of that name, or a key beside that looks so or begins so.

    A name is known by its initials too (lr: learning_rate). What looks like nothing has no hint.
    """
    cls: type = root
    for name in keys:
        cls = _section(_hints(cls)[name]) or cls
    renamed = [field.name for field in _fields(cls) if field.metadata.get("was") == key]
    places = list(_paths(root))
    named = [place for place in places if place.rpartition(".")[2] == last][:3]
    beside = difflib.get_close_matches(key, _hints(cls), n=1, cutoff=_ALIKE)
    beside = beside or [name for name in _hints(cls) if name.startswith(f"{key}_")][:1]
    initials = [p for p in places if "".join(part[:1] for part in p.rpartition(".")[2].split("_")) == last][:3]
    for found in (renamed, named if key == last else [], beside, named, initials):
        if found:
            return found
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
