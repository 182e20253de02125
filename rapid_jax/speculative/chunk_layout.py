# SPDX-License-Identifier: Apache-2.0
"""How prompts are cut into chunks, of sizes so few that programs are shared, and where their tokens lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rapid_jax.attention.order import zigzag
from rapid_jax.runtime.errors import InputError


def bucket(count: int, least: int = 1) -> int:
    """The smallest size of a short ladder (8 steps an octave, multiples of `least`) that holds `count`.

    Programs are compiled for these sizes only; at most 1/8 of the slots is empty once count >= 8 least.
    """
    units = max(-(-count // least), 1)
    step = max(1, 1 << max(units.bit_length() - 4, 0))
    return -(-units // step) * step * least


def coarse_bucket(count: int, least: int = 1) -> int:
    """As `bucket`, of a ladder with two steps an octave (1, 2, 3, 4, 6, 8, 12 ...): at most a third is empty."""
    units = max(-(-count // least), 1)
    octave = 1 << (units - 1).bit_length()
    return (octave * 3 // 4 if octave > 2 and units <= octave * 3 // 4 else octave) * least


@dataclass(frozen=True)
class ChunkLayout:
    """Where the tokens of prompts go: chunks in zigzag order over the context devices, one behind the other on each.

    2 devices, 2 chunks of 8 tokens   device 0: 0 1 6 7  8 9 14 15   device 1: 2 3 4 5  10 11 12 13
    """

    chunk: int
    chunks: int
    slots: int  # of all devices together
    devices: int  # along the context axis

    @classmethod
    def of(cls, longest: int, chunk: int, devices: int, *, coarse: bool = False) -> "ChunkLayout":
        """The layout for prompts of up to `longest` tokens, `chunk` at a time; `coarse`: of few sizes."""
        unit = 1 if devices == 1 else 2 * devices
        if chunk % unit:
            raise InputError(f"a prefill chunk must be a multiple of {unit} (2 x context {devices}), got {chunk}")
        round_up = coarse_bucket if coarse else bucket
        chunk = min(chunk, coarse_bucket(max(longest, 16 * unit), unit) if coarse else bucket(longest, unit))
        chunks = -(-longest // chunk)
        return cls(chunk, chunks, round_up(chunks * chunk, chunk), devices)

    def chunked(self, rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
        """int32 [chunks, B, chunk]: the rows' items by chunk in zigzag order, `fill` behind their ends."""
        grid = np.full((len(rows), self.chunks * self.chunk), fill, np.int32)
        for index, row in enumerate(rows):
            grid[index, : len(row)] = row
        order = zigzag(self.chunk, self.devices)
        return grid.reshape(len(rows), self.chunks, self.chunk).swapaxes(0, 1)[:, :, order]

    def slotted(self, chunked: np.ndarray, fill: int) -> np.ndarray:
        """int32 [B, slots]: what `chunked` gave, where the prefix has it."""
        batch = chunked.shape[1]
        shares = chunked.reshape(self.chunks, batch, self.devices, self.chunk // self.devices).transpose(1, 2, 0, 3)
        slots = np.full((batch, self.devices, self.slots // self.devices), fill, np.int32)
        slots[:, :, : shares.shape[2] * shares.shape[3]] = shares.reshape(batch, self.devices, -1)
        return slots.reshape(batch, self.slots)
