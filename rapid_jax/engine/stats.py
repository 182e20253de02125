# SPDX-License-Identifier: Apache-2.0
"""What an engine has done and holds, in numbers."""

from dataclasses import dataclass

from rapid_jax.config import RapidConfig
from rapid_jax.model.load import LoadedModel
from rapid_jax.speculative.generate import Generation


@dataclass
class EngineCounts:
    """What all answers together took."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    tokens: int = 0

    def add(self, generation: Generation) -> None:
        """One answer more."""
        self.drafted += generation.drafted[0]
        self.accepted += generation.accepted[0]
        self.rounds += generation.rounds[0]
        self.tokens += len(generation.tokens[0])


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made; `waiting` and `running` are now's."""

    waiting: int
    running: int
    kv_bytes: dict[str, int]  # by tier: device, host, disk
    drafted: int
    accepted: int
    rounds: int
    tokens: int


def bytes_of_rows(config: RapidConfig, target: LoadedModel, rows: int) -> int:
    """About what rows take besides documents: the drafter's prompts and what is said, twice while they grow."""
    shape, itemsize = target.config, target.decoder.embed_VD[...].dtype.itemsize
    slots = 3 * config.retrieval.min_tokens // 2 + config.sampling.max_new_tokens + 1024
    each = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * itemsize
    return 2 * rows * slots * each
