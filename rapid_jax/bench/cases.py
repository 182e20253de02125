# SPDX-License-Identifier: Apache-2.0
"""What is measured, what came of it, and the least time that it could have taken."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from rapid_jax.model.config import ModelConfig
from rapid_jax.plan.cost import matrices_read, slots_seen
from rapid_jax.runtime.mesh_config import MeshConfig

# none: plain decoding; attended: over what the target attends to, in the place of a prompt of its own
Drafter: TypeAlias = Literal["none", "full", "int8", "int4", "attended", "attended-int8", "attended-int4"]
KvBits: TypeAlias = Literal["full", "int8"]
FIRST_DIAL = 8.0  # at which drafts are first tried


@dataclass(frozen=True)
class Case:
    """One way to decode at one length."""

    context: int  # tokens of the target's prompt
    drafter: Drafter = "none"
    kv: KvBits = "full"  # of the target's prompt
    batch: int = 1
    gamma: int | Literal["auto"] = 0
    documents: int | None = None  # that the prompts are about, equally many about each; None: one each
    shape: str | None = None  # of a drafter that is another model; None: the target's own weights draft
    quoting: bool | None = None  # prompt lookup: in a text that holds the answer, in one that does not; None: off

    @property
    def baseline(self) -> "Case":
        """Plain decoding of the same prompts, keys and values in full."""
        return Case(self.context, batch=self.batch, documents=self.documents)

    @property
    def attends(self) -> bool:
        """Whether the drafter reads a part of the target's keys and values."""
        return self.drafter.startswith("attended")

    @property
    def weights(self) -> str:
        """How the drafter's are stored: full, int8, int4."""
        return self.drafter.removeprefix("attended").removeprefix("-") or "full"

    @property
    def prefixes(self) -> int:
        """Documents whose keys and values are stored, and read in a step."""
        return self.documents or self.batch

    def __str__(self):
        drafter = self.drafter if self.shape is None else f"{self.shape} {self.drafter}"
        name = "plain" if self.drafter == "none" else f"rapid, drafter {drafter}"
        copies = {None: "", True: ", copies, quoting", False: ", copies, not quoting"}[self.quoting]
        about = "" if self.documents is None else f", {self.documents} document{'s' * (self.documents > 1)}"
        return f"{name}{copies}{', kv int8' if self.kv == 'int8' else ''}{about}"


@dataclass(frozen=True)
class Timing:
    """Several timings of one thing, in one unit."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float], unit: float = 1.0) -> "Timing":
        """Of the values, each in so many of the unit."""
        return cls(unit * statistics.median(values), unit * min(values), unit * max(values))


@dataclass(frozen=True)
class Measured:
    """What a case took. Times are of all rows of the batch together, medians of several timings."""

    case: Case
    dial: float  # of the models that decoded
    ms_per_token: float  # of one row: milliseconds in which every row gets a token, on average
    ms_least: float  # of the timings
    ms_most: float
    timings: int
    tokens_per_second: float  # of all rows
    acceptance: float | None  # of the drafts that were looked at, how many were accepted
    tokens_per_round: float
    rounds: int
    draft_steps: int
    compile_seconds: float
    floor_ms: float | None  # of a plain token: a device's weights and cache read once, at its memory's rate
    same: str  # as plain decoding at temperature 0: "yes", "until a tie", or what differs
    baseline_ms: float | None  # plain decoding's ms_per_token at this dial; None of plain decoding itself
    ratio: float | None  # baseline_ms over ms_per_token; None without one, and where the tokens differ

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": str(self.case), **asdict(self)}


def plain_bytes(config: ModelConfig, case: Case, itemsize: int, mesh: MeshConfig | None = None) -> float:
    """What a plain step must read: every matrix once, and the keys and values of all documents.

    Of experts those that the rows of the batch are expected to touch.

    On a mesh what a device must read: its part of the matrices, which `context` does not split, and of the slots.
    """
    mesh = mesh or MeshConfig()
    weights = (matrices_read(config, case.batch) + config.hidden_size * config.vocab_size) / mesh.model
    slots = 2 * slots_seen(config, case.context) * config.num_kv_heads / mesh.model / mesh.context * case.prefixes
    stored = config.head_dim * itemsize if case.kv == "full" else config.head_dim + 4
    return itemsize * weights + slots * stored


def table(rows: Sequence[Measured]) -> Iterator[str]:
    """A line a case."""
    head = f"{'context':>8} {'batch':>5} {'gamma':>5} {'dial':>6}  {'case':<36} {'ms/token':>9} {'least to most':>16}"
    yield (
        f"{head} {'tokens/s':>9} {'floor':>6} {'accepted':>8} {'a round':>7} {'plain ms':>8} {'ratio':>6}  same tokens"
    )
    for row in rows:
        case = row.case
        accepted = "" if row.acceptance is None else f"{row.acceptance:.3f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        floor = "" if row.floor_ms is None else f"{row.floor_ms:.2f}"
        plain = "" if row.baseline_ms is None else f"{row.baseline_ms:.2f}"
        spread = f"{row.ms_least:.2f} to {row.ms_most:.2f}"
        speeds = f"{row.ms_per_token:>9.2f} {spread:>16} {row.tokens_per_second:>9.1f} {floor:>6}"
        yield (
            f"{case.context:>8} {case.batch:>5} {case.gamma:>5} {row.dial:>6.4g}  {case!s:<36} {speeds} {accepted:>8} "
            f"{row.tokens_per_round:>7.2f} {plain:>8} {ratio:>6}  {row.same}"
        )
