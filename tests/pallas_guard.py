# SPDX-License-Identifier: Apache-2.0
"""An interpreted kernel must not read outside its arrays either: what a device would read as junk fails here."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest
from jax.experimental import pallas as pl

from rapid_jax.attention import flash_decode
from rapid_jax.model import skinny


def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every block that a program of a kernel's grid is given begins inside its array.

    Pallas's interpreter moves a block that does not back into the array, where a device reads what lies behind it. What
    a kernel reads behind the end of a block the interpreter fills with NaN by itself, or the least whole number.
    """
    call = pl.pallas_call

    def guarded(kernel: Callable, *, grid: tuple[int, ...], in_specs: Sequence, out_specs: Any, out_shape: Any, **how):
        made = call(kernel, grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape, **how)

        def run(*arrays: jax.Array):
            outs = zip(jax.tree.leaves(out_specs), jax.tree.leaves(out_shape), strict=True)
            for spec, array in (*zip(in_specs, arrays, strict=True), *outs):
                for program in itertools.product(*map(range, grid)):
                    check_block(spec, program, array.shape)
            return made(*arrays)

        return run

    for module in (flash_decode, skinny):
        monkeypatch.setattr(module.pl, "pallas_call", guarded)


def check_block(spec: pl.BlockSpec, program: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises IndexError if the block of that program of the grid begins outside an array of this shape."""
    starts = [
        index * (1 if size is None else size)
        for index, size in zip(spec.index_map(*program), spec.block_shape, strict=True)
    ]
    if not all(0 <= start < size for start, size in zip(starts, shape, strict=True)):
        raise IndexError(f"program {program} is given a block from {starts} on of an array of shape {shape}")
