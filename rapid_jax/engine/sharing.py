# SPDX-License-Identifier: Apache-2.0
"""Which lane a request joins: rows of several sizes run side by side where that compiles nothing that need not be."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import le
from typing import TypeAlias

from rapid_jax.engine.lane import Lane, LaneKey
from rapid_jax.speculative.rounds import Slots

Size: TypeAlias = tuple[int, int]  # of a lane: documents, rows of each


@dataclass
class Sharing:
    """A lane's rows have one size for good, and a smaller row may join it: its arrays are copied into larger ones.

    That is one small program for a pair of sizes; a lane that grew would need others for every number of rows. So a
    row joins the largest lane that the program is there for. Without any, a row of a declared size has a lane of its
    own, whose programs are there, and another row joins the largest lane there is: a lane of its own may need more.

    Where a warm-up has compiled for several rows, a question about a document whose rows are all taken waits for one of
    them: while a program for more rows is compiled nobody gets a token. So does a request without a document, whose row
    nobody else's can be about, for a row of a lane that has one of each. One about another document does not wait.
    """

    declared: dict[Slots, set[Size]] = field(default_factory=dict)  # of rows; the lanes that a warm-up has compiled for
    pairs: set[tuple[Slots, Slots]] = field(default_factory=set)  # (of a row, of a lane that such a row has joined)

    def place(
        self,
        lanes: Mapping[LaneKey, Lane],
        key: LaneKey,
        document: Hashable,
        others: Sequence[Hashable],
        *,
        shared: bool = True,
    ) -> tuple[LaneKey, Size | None] | None:
        """(a lane's key, its sizes for this request and for those about the `others` that come with it). Without
        sizes the lane is yet to be made; None: the request waits for a row. `shared`: others may be about the document.
        """
        for found in self._joinable(lanes, key, document):
            for documents in ([document, *others], [document]):
                sizes = lanes[found].sizes_with(documents)
                if sizes is not None and self._may_grow(found, lanes[found], sizes, shared):
                    return found, sizes
        return None if key in lanes else (key, None)

    def _may_grow(self, key: LaneKey, lane: Lane, sizes: Size, shared: bool) -> bool:
        known = set() if key.slots is None else self.declared.get(key.slots, set())
        in_documents, in_rows = sizes[0] > len(lane.documents), sizes[1] > lane.each
        # Any row that ends makes place for one without a document where each has one row, and only then.
        waits = in_rows if shared else in_documents and lane.each == 1
        return not waits or len(known) < 2 or sizes in known

    def joined(self, key: LaneKey, lane: LaneKey) -> None:
        """A row of this key is in that lane."""
        if key.slots is not None and lane.slots is not None and key != lane:
            self.pairs.add((key.slots, lane.slots))

    def _joinable(self, lanes: Mapping[LaneKey, Lane], key: LaneKey, document: Hashable) -> list[LaneKey]:
        """The best first: one that has the document, then the largest."""
        found = [lane for lane in lanes if self._may_join(key, lane, alone=key not in lanes)]
        return sorted(found, key=lambda lane: (document in lanes[lane].documents, lane.slots or ()), reverse=True)

    def _may_join(self, key: LaneKey, lane: LaneKey, *, alone: bool) -> bool:
        if key == lane:
            return True
        if not fits(key, lane) or key.slots is None or lane.slots is None:
            return False
        return (key.slots, lane.slots) in self.pairs or (alone and key.slots not in self.declared)


def fits(key: LaneKey, lane: LaneKey) -> bool:
    """Whether such a row could be one of that lane's, once its arrays are as large."""
    if key.slots is None or lane.slots is None or replace(key, slots=lane.slots) != lane:
        return False
    return len(key.slots) == len(lane.slots) and all(map(le, key.slots, lane.slots))
