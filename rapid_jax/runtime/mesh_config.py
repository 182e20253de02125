# SPDX-License-Identifier: Apache-2.0
"""What the settings say of a device mesh. Imports no jax: settings are read before jax is configured."""

import math
from dataclasses import dataclass, replace

from rapid_jax.runtime.errors import InputError

AXES = ("data", "fsdp", "context", "model")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices."""

    data: int = 1  # copies of the model, each with its own part of the batch
    fsdp: int = 1  # parts of each weight along embed, gathered where used; also splits the batch
    context: int = 1  # parts of a sequence: ring attention
    model: int = 1  # parts of the heads, the ffn and the vocabulary
    replicate_kv: bool = False  # with more model parts than kv heads: each part gets a copy of the head it needs

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"mesh axis {axis} must be a positive whole number, got {size!r}")

    @classmethod
    def named(cls, text: str) -> "MeshConfig":
        """Of axes and sizes as "context=2,model=4". Raises InputError for anything else."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition("=")
            if axis not in AXES or axis in sizes or not size.isdecimal():
                raise InputError(f"expected mesh axes of {', '.join(AXES)} as context=2,model=4, got {text!r}")
            sizes[axis] = int(size)
        return replace(cls(), **sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along data, fsdp, context, model."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.sizes)

    def __str__(self):
        return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True))
