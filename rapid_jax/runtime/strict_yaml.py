# SPDX-License-Identifier: Apache-2.0
"""YAML without surprises: duplicate keys are errors, and a scalar is number, truth value, null or text as in YAML 1.2.

PyYAML follows YAML 1.1, where `1e-6` is text, `no` is false, `010` is eight, `12:30` is 750 and `2026-01-01` is a date.
Here `1e-6` is a number and the other four are text.
"""

import re
from typing import Any

import yaml

from rapid_jax.runtime.errors import InputError

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_FLOAT_PATTERN = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?\Z
       |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+\Z
       |[-+]?\.(?:inf|Inf|INF)\Z
       |\.(?:nan|NaN|NAN)\Z""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced whole and never mutated in place

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


_Loader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either this module or a YAML 1.1 reader would take for something else."""


_Dumper.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def parse(text: str, source: str) -> Any:
    """The value that the YAML document `text` stands for.

    Raises InputError naming `source` and, where YAML knows it, the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise InputError(f"{place}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        # Explicit tags (!!int '', !!bool maybe) and deep nesting raise what they like.
        raise InputError(f"{source}: not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error


def emit(tree: Any) -> str:
    """YAML text that `parse` reads back to a value equal to `tree`: keys in their order, each list on one line."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
