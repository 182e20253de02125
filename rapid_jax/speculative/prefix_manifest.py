# SPDX-License-Identifier: Apache-2.0
"""What a stored prefix is: written last, sealed for its key, and all that is needed to open its arrays."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rapid_jax.runtime.array_store import Array, Damaged
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.sealed import sealed, unsealed
from rapid_jax.runtime.storage import AnyPlace, bytes_of

MANIFEST: Final = "manifest.json"
INSIDE: Final = re.compile(r"arrays|[0-9a-f]{16}")  # a folder of arrays; arrays: of earlier versions
_FORMAT: Final = 4
NEAR: Final = "near_"  # before the names of the arrays of layers with a window
_SUMS: Final = "sums_BKS"
_FIELDS: Final = (["k_BKSH", "v_BKSH", _SUMS], ["k_BKSH", "v_BKSH", "k_scale_BKS", "v_scale_BKS", _SUMS])
_MOST_LAYERS, _MOST_TOKENS = 2**12, 2**31 - 1


def key_of(key: str, before: str) -> str:
    """What the sums of a group of layers depend on, of a prefix stored under the key."""
    return f"{before}{key}"


@dataclass(frozen=True)
class Manifest:
    """A prefix of one row; each field is an array [layers, kv heads, positions, ...] in a folder of its name.

    Layers with a window have arrays of their own, of the last `near_tokens` tokens. So are the sums of what lies in a
    slot (prefix_sums.py), and nothing beside them says that the values are right.
    """

    tokens: int
    inside: str  # the folder in the entry that its arrays are in
    arrays: dict[str, Array]
    marks: Sequence[str]  # what the prefix is found by
    near_tokens: int = 0  # that layers with a window keep

    @property
    def groups(self) -> dict[str, tuple[int, dict[str, Array]]]:
        """Of layers that keep the same tokens, by what stands before their arrays' names: (tokens, arrays)."""
        near = {name.removeprefix(NEAR): array for name, array in self.arrays.items() if name.startswith(NEAR)}
        full = {name: array for name, array in self.arrays.items() if not name.startswith(NEAR)}
        every = {"": (self.tokens, full), NEAR: (self.near_tokens, near)}
        return {before: group for before, group in every.items() if group[1]}

    def size(self) -> int:
        """Bytes of the arrays' files."""
        return sum(array.bytes for array in self.arrays.values())

    def sealed(self, key: str) -> bytes:
        """What `read` reads under this key and no other."""
        arrays = {name: array.as_json() for name, array in self.arrays.items()}
        said = {"format": _FORMAT, "tokens": self.tokens, "near_tokens": self.near_tokens, "inside": self.inside}
        said |= {"bytes": self.size()}
        return sealed({**said, "arrays": arrays, "marks": list(self.marks)}, key)

    @classmethod
    def inside_of(cls, entry: AnyPlace, key: str) -> str:
        """The folder in the entry that its arrays are in; empty without a manifest that is whole."""
        with contextlib.suppress(Damaged):
            return cls.read(entry, key).inside
        return ""

    @classmethod
    def read(cls, entry: AnyPlace, key: str) -> "Manifest":
        """The manifest of the entry.

        Raises Damaged if it is not there as it was written, and OSError or InputError where it cannot be read now.
        """
        place = entry / MANIFEST
        data = bytes_of(place)
        if data is None:
            raise Damaged(f"{place}: no such file: the entry is of an earlier version, or damaged")
        try:
            fields = unsealed(data, key, str(place))
            if fields.whole("format") != _FORMAT:
                raise fields.error("format", f"{_FORMAT}, which this program reads")
            stated = fields.fields("arrays")
            arrays = {name: Array.of_json(stated, name) for name in stated}
            tokens = fields.whole("tokens", least=1, most=_MOST_TOKENS)
            if not INSIDE.fullmatch(inside := fields.text("inside")):
                raise fields.error("inside", "the name of a folder of arrays")
            found = cls(tokens, inside, arrays, fields.texts("marks"), fields.whole("near_tokens", most=tokens))
            if not found.groups:
                raise fields.error("arrays", "those of keys and values")
            for group in found.groups.values():
                _check(fields, *group)
            return found
        except InputError as error:
            raise Damaged(legible(str(error))) from error


def _check(fields: Fields, tokens: int, arrays: dict[str, Array]) -> None:
    """Raises InputError where the arrays are not those of so many tokens."""
    if list(arrays) not in _FIELDS:
        raise fields.error("arrays", "those of keys and values")
    first, shapes = arrays["k_BKSH"].shape, [array.shape for array in arrays.values()]
    if any(shape[:2] != first[:2] or tokens not in shape[2:] for shape in shapes):
        raise fields.error("arrays", f"arrays of {tokens} tokens, and of as many layers and heads")
    if len(first) != 4 or first[0] > _MOST_LAYERS:
        raise fields.error("arrays", f"arrays of 4 axes and at most {_MOST_LAYERS} layers")
