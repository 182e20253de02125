# SPDX-License-Identifier: Apache-2.0
"""A stage that several hosts make, a share each, in RUN/pairs-shares or RUN/reference-shares: until all are there and
are joined in RUN/pairs or RUN/reference.

    begun.json             what all shares are made with, how many there are among it; of whoever was first
    0-of-3/                what the stage has, of a part of the documents: done.json when it is all there
    0-of-3/lock            held by the run that makes the share; in a bucket lease.json

A share is made of whole groups of documents that follow each other, so that what it makes is that of one run.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longpo_jax.stages import check_inputs, has_ended, is_done
from rapid_jax.runtime.errors import Busy, InputError
from rapid_jax.runtime.files import remove_folder
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.run_folder import LEASE, alone_in_logs, is_entered, write_once
from rapid_jax.runtime.sealed import sealed, unsealed
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace, bytes_of

_BEGUN, _LOCK = "begun.json", "lock"


def documents_of(share: Share, documents: int, batch: int) -> range:
    """Which of the documents, that are worked on in groups of `batch`, a share has."""
    groups = -(-documents // batch)
    first, end = (groups * at // share.count for at in (share.index, share.index + 1))
    return range(min(first * batch, documents), min(end * batch, documents))


class Shares:
    """Those of a stage of the round in `folder`. One process of a run has them, and looks at what is there each time.

    `is_begun` says of the folder of a stage whether one run has begun it.
    """

    def __init__(self, folder: AnyPlace, stage: str, is_begun: Callable[[AnyPlace], bool]):
        self._folder, self._stage, self._is_begun = folder / f"{stage}-shares", stage, is_begun

    def place(self, share: Share) -> AnyPlace:
        """Where a share is made."""
        return self._folder / f"{share.index}-of-{share.count}"

    def inputs_of(self, share: Share, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a share is made with; `inputs` is what all are."""
        return {**inputs, "share": f"{share.index}/{share.count}"}

    def begun(self) -> Fields | None:
        """What begun.json says; None where no share was begun."""
        data = bytes_of(self._folder / _BEGUN)
        return None if data is None else self._read(data)

    def check(self, inputs: Mapping[str, Any], stage: AnyPlace) -> None:
        """Raises InputError where shares were begun with others than these inputs, which need not be all there are, and
        where one run has begun the stage, whose folder is `stage`.
        """
        begun = self.begun()
        if begun is not None:
            made = begun.fields("inputs")
            check_inputs(self._folder, inputs, {key: made[key] for key in made if key in inputs})
        elif self._is_begun(stage):
            raise InputError(
                f"{stage}: expected nothing there that one run has begun, got some: go on without --share, or delete "
                f"{stage} to make it in shares"
            )

    def begin(self, inputs: Mapping[str, Any], dropped: Mapping[str, int]) -> None:
        """Says what all shares are made with, and what was left out of the documents. Raises InputError for others."""
        value = {"inputs": dict(inputs), "corpus_dropped": dict(dropped)}
        begun = self._read(write_once(self._folder / _BEGUN, sealed(value, _BEGUN, indent=1)))
        check_inputs(self._folder, inputs, begun.fields("inputs"))

    def take(
        self,
        stack: contextlib.ExitStack,
        share: Share,
        inputs: Mapping[str, Any],
        stage: AnyPlace,
        *,
        alone: bool,
    ) -> bool:
        """Whether a share is to be made by this run, which then holds it until the stack is left.

        It is not if it is done, or if another run makes it; of one that is asked for `alone` that raises Busy.
        """
        place, own = self.place(share), self.inputs_of(share, inputs)
        if self._is_made(place, own, stage):
            return False
        place.mkdir(parents=True, exist_ok=True)
        held = alone_in_logs(place, [_LOCK], LEASE, quiet=not alone)
        if alone:
            stack.enter_context(held)
        elif not is_entered(stack, held):
            return False
        return not self._is_made(place, own, stage)  # by now

    def _is_made(self, place: AnyPlace, own: Mapping[str, Any], stage: AnyPlace) -> bool:
        try:
            return is_done(place, own) or has_ended(stage)  # in this order: what is joined is taken away
        except InputError:
            if has_ended(stage):  # while it was read
                return True
            raise

    def missing(self, count: int) -> list[Share]:
        """Those that are not done."""
        return [share for share in (Share(index, count) for index in range(count)) if not has_ended(self.place(share))]

    @contextlib.contextmanager
    def to_join(self, stage: AnyPlace, inputs: Mapping[str, Any]) -> Iterator[tuple[list[AnyPlace], dict[str, int]]]:
        """(the folders of all shares in their order, what was left out of the documents).

        No other run joins them until the context is left. Raises InputError if the shares are of other inputs, or not
        all done.
        """
        self.check(inputs, stage)
        with alone_in_logs(self._folder, [_LOCK], LEASE):
            if (begun := self.begun()) is None:
                raise Busy(f"{self._folder}: another run has joined the shares meanwhile")
            made, dropped = begun.fields("inputs"), begun.fields("corpus_dropped")
            count = made.whole("shares", least=1)
            if left := self.missing(count):
                raise InputError(
                    f"{self._folder}: expected {count} shares that are done, got {count - len(left)}: `longpo "
                    f"{self._stage} --share any/{count}` makes the others; or delete {self._folder} to start again"
                )
            shares = [Share(index, count) for index in range(count)]
            for share in shares:
                is_done(self.place(share), self.inputs_of(share, dict(made)))
            yield [self.place(share) for share in shares], {name: dropped.whole(name) for name in dropped}

    def remove(self) -> None:
        """Takes all of them away, if there are any: they were joined."""
        if self._folder.exists():
            remove_folder(self._folder)

    def _read(self, data: bytes) -> Fields:
        try:
            return unsealed(data, _BEGUN, str(self._folder / _BEGUN))
        except InputError as error:
            raise InputError(f"{error}: delete {self._folder} to start again") from error
