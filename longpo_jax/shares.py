# SPDX-License-Identifier: Apache-2.0
"""Pairs that several hosts make, a share each, in RUN/pairs-shares: until all are there and are joined in RUN/pairs.

    begun.json             what all shares are made with, how many there are among it; of whoever was first
    0-of-3/                what a stage of pairs has: the records, the journal, done.json when they are all there
    0-of-3/lock            held by the run that makes the share; in a bucket lease.json

A share is made of whole groups of documents that follow each other, so that its answers are those of one run.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from longpo_jax.journal import Writer, is_begun, written
from longpo_jax.stages import check_inputs, has_ended, is_done
from rapid_jax.runtime.errors import Busy, InputError
from rapid_jax.runtime.files import remove_folder
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.run_folder import LEASE, alone_in_logs, is_entered, written_once
from rapid_jax.runtime.sealed import sealed, unsealed
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace, bytes_of

_FOLDER, _BEGUN, _LOCK = "pairs-shares", "begun.json", "lock"


def documents_of(share: Share, documents: int, batch: int) -> range:
    """Which of the documents, that are answered in groups of `batch`, a share has."""
    groups = -(-documents // batch)
    first, end = (groups * at // share.count for at in (share.index, share.index + 1))
    return range(min(first * batch, documents), min(end * batch, documents))


class Shares:
    """Those of the round in `folder`. One process of a run has them, and looks at what is there each time."""

    def __init__(self, folder: AnyPlace):
        self._folder = folder / _FOLDER

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
        where pairs were begun in the folder of the stage itself.
        """
        begun = self.begun()
        if begun is not None:
            made = begun.fields("inputs")
            check_inputs(self._folder, inputs, {key: made[key] for key in made if key in inputs})
        elif is_begun(stage):
            raise InputError(
                f"{stage}: expected no pairs there that one run has begun, got some: go on without --share, or delete "
                f"{stage} to make them in shares"
            )

    def begin(self, inputs: Mapping[str, Any], dropped: Mapping[str, int]) -> None:
        """Says what all shares are made with, and what was left out of the corpus. Raises InputError for others."""
        value = {"inputs": dict(inputs), "corpus_dropped": dict(dropped)}
        begun = self._read(written_once(self._folder / _BEGUN, sealed(value, _BEGUN, indent=1)))
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
    def joined(
        self, stage: AnyPlace, inputs: Mapping[str, Any], *, shard_pairs: int
    ) -> Iterator[tuple[Writer, dict[str, int]]]:
        """(all documents of all shares in their order as one run writes them, what was left out of the corpus).

        Goes on where it was interrupted; no other run does it until the context is left. Raises InputError if the
        shares are of other inputs, or not all done.
        """
        self.check(inputs, stage)
        with alone_in_logs(self._folder, [_LOCK], LEASE):
            if (begun := self.begun()) is None:
                raise Busy(f"{self._folder}: another run has joined the shares meanwhile")
            made, dropped = begun.fields("inputs"), begun.fields("corpus_dropped")
            count = made.whole("shares", least=1)
            if left := self.missing(count):
                raise InputError(
                    f"{self._folder}: expected {count} shares that are done, got {count - len(left)}: `longpo pairs "
                    f"--share any/{count}` makes the others; or delete {self._folder} to start again"
                )
            writer = Writer(stage, inputs, shard_pairs=shard_pairs)
            there = iter(tuple(writer.finished))
            for share in (Share(index, count) for index in range(count)):
                is_done(place := self.place(share), self.inputs_of(share, dict(made)))
                for id, record, counts in written(place):
                    if (finished := next(there, None)) is None:
                        writer.hold(id, record, counts)
                    elif finished != id:
                        raise InputError(f"{stage}: expected the document {id}, got {finished}: delete it")
            yield writer, {name: dropped.whole(name) for name in dropped}

    def remove(self) -> None:
        """Takes all of them away, if there are any: they were joined."""
        if self._folder.exists():
            remove_folder(self._folder)

    def _read(self, data: bytes) -> Fields:
        try:
            return unsealed(data, _BEGUN, str(self._folder / _BEGUN))
        except InputError as error:
            raise InputError(f"{error}: delete {self._folder} to start again") from error
