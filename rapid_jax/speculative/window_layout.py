# SPDX-License-Identifier: Apache-2.0
"""Which slots the layers with a window keep: of the chunks before the one that is computed, and at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rapid_jax.attention.order import inverse, zigzag
from rapid_jax.speculative.chunk_layout import ChunkLayout

_UNIT = 128  # slots a device: what kernels for TPUs read at once


@dataclass(frozen=True)
class WindowLayout:
    """Where the tokens of prompts that are read by `chunks` go in layers with a window.

    While a chunk is computed there are the chunks before it that its tokens see, one behind the other on each context
    device as in a full prefix. At the end there are of each prompt the last tokens that a later one sees, as one chunk.
    Where a prompt has no more slots than that all of it stays.
    """

    window: int
    chunks: ChunkLayout

    @property
    def reach(self) -> int:
        """Tokens before its own that a token sees; of a window of 1, where it sees none, one stays all the same."""
        return max(self.window - 1, 1)

    @property
    def kept(self) -> ChunkLayout:
        """Of the finished prompt."""
        unit = _UNIT * self.chunks.devices
        slots = -(-self.reach // unit) * unit
        if slots >= self.chunks.slots:
            return self.chunks
        return ChunkLayout(slots, 1, slots, self.chunks.devices)

    @property
    def is_whole(self) -> bool:
        """Whether every token of a prompt stays."""
        return self.kept == self.chunks

    @property
    def before(self) -> ChunkLayout:
        """Of the chunks before the one that is computed."""
        reached = -(-self.reach // self.chunks.chunk)
        if self.is_whole or reached >= self.chunks.slots // self.chunks.chunk:
            return self.chunks
        return ChunkLayout(self.chunks.chunk, reached, reached * self.chunks.chunk, self.chunks.devices)

    def first_before(self, index: int) -> int:
        """The first of the chunks that there are while chunk `index` is computed."""
        return max(index - self.before.slots // self.before.chunk, 0)

    def first_kept(self, length: int) -> int:
        """The first token of a finished prompt that stays."""
        return 0 if self.is_whole else max(length - self.reach, 0)

    def positions(self, lengths: Sequence[int]) -> np.ndarray:
        """int32 [B, slots]: the position of each slot of the finished prompts, -1 of an empty one."""
        starts = [self.first_kept(length) for length in lengths]
        rows = [range(length - start) for start, length in zip(starts, lengths, strict=True)]
        slots = self.kept.slotted(self.kept.chunked(rows, -1), -1)
        return np.where(slots < 0, -1, slots + np.asarray(starts, np.int32)[:, None]).astype(np.int32)

    def sources(self, lengths: Sequence[int], index: int) -> np.ndarray:
        """int32 [B, slots]: where the slots that stay of prompts that end in chunk `index` come from while it is
        computed, its slots lying behind those before it. Those of other prompts mean nothing."""
        chunk, devices, before = self.chunks.chunk, self.chunks.devices, self.before
        pos_BS = np.maximum(self.positions(lengths), 0)
        which, place = pos_BS // chunk, self._place[pos_BS % chunk]
        share = chunk // devices
        far = place // share * (before.slots // devices) + (which - self.first_before(index)) * share + place % share
        return np.where(which == index, before.slots + place, np.clip(far, 0, before.slots - 1)).astype(np.int32)

    @cached_property
    def _place(self) -> np.ndarray:
        """Where a chunk has each of its tokens."""
        return inverse(zigzag(self.chunks.chunk, self.chunks.devices))
