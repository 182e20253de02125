# SPDX-License-Identifier: Apache-2.0
"""The stage that makes preference pairs (LongPO, arXiv 2502.13922): documents in, records out.

Of each document: excerpts, a question about each, its answer from the excerpt (chosen), its answer from the whole
document (rejected). The model that is taught says all of it; that the excerpt's answer is the better one is assumed.
One run makes all of them, or several hosts make a share each (shares.py).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest

import jax

from longpo_jax.beside import beside
from longpo_jax.config import LongPOConfig
from longpo_jax.documents import Corpus, read_corpus
from longpo_jax.generator import Generator
from longpo_jax.journal import Writer, is_begun, written
from longpo_jax.objectives import objective_of
from longpo_jax.pair_counts import summary_line, summary_of
from longpo_jax.pair_maker import PairMaker
from longpo_jax.share_loop import make_shares
from longpo_jax.shares import Shares, documents_of
from longpo_jax.shortfall import lost, warning
from longpo_jax.stages import inputs_of, is_to_skip, stage_in
from rapid_jax.runtime.agreement import check_agreed
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.mesh import agreed
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace


def run_pairs(config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """Makes the records of `folder`/pairs (records.py) and marks the stage done; goes on where it was interrupted.

    Where they were begun in shares, those are joined. Every process of a run computes the same; the one that
    `leads` reads and writes the folder. Raises InputError for what cannot be used, if not one pair is left, and if not
    all shares are done.
    """
    job, shares = _Job(config, folder, leads=leads, quiet=quiet), Shares(folder, "pairs", is_begun)
    if job.is_done():
        if leads:
            shares.remove()
        return
    if agreed(leads and shares.begun() is not None):
        if leads:
            with shares.to_join(job.folder, job.inputs) as (places, dropped):
                writer = Writer(job.folder, job.inputs, shard_pairs=config.pairs.shard_pairs)
                _join(writer, places, job.folder)
                job.finish(writer, dropped)
            shares.remove()
        return
    writer = Writer(job.folder, job.inputs, shard_pairs=config.pairs.shard_pairs) if leads else None
    job.make(writer, job.folder, range(len(job.corpus.documents)))
    if writer is not None:
        job.finish(writer, job.corpus.dropped)


def run_share(
    config: LongPOConfig, folder: AnyPlace, asked: Sequence[Share], *, leads: bool = True, quiet: bool = False
) -> bool:
    """Makes the shares that are asked for, as `make_shares`. Whether all are now done, to be joined by `run_pairs`.

    Raises InputError for what cannot be used, and if another run makes the one that is asked for.
    """
    job, shares = _Job(config, folder, leads=leads, quiet=quiet), Shares(folder, "pairs", is_begun)
    if job.is_done():
        return True
    count, batch = asked[0].count, config.pairs.batch
    inputs = {**job.inputs, "pairs.batch": batch, "shares": count}
    if leads:
        shares.check(inputs, job.folder)  # the documents take a while
    documents = job.corpus.documents
    inputs["documents"] = documents.digest
    if leads:
        shares.begin(inputs, job.corpus.dropped)

    def make(share: Share) -> None:
        place, own = shares.place(share), shares.inputs_of(share, inputs)
        writer = Writer(place, own, shard_pairs=config.pairs.shard_pairs) if leads else None
        job.make(writer, place, documents_of(share, len(documents), batch))
        if writer is not None:
            writer.finish({"documents": len(writer.finished)})

    return make_shares(shares, asked, inputs, job.folder, make, leads=leads, quiet=quiet)


class _Job:
    """The pairs of a run: what decides them, the documents, and how both become records."""

    def __init__(self, config: LongPOConfig, folder: AnyPlace, *, leads: bool, quiet: bool):
        self.folder = stage_in(folder, "pairs")
        self._config, self._leads, self._quiet = config, leads, quiet
        self._generator = Generator(config, quiet=quiet)
        self.inputs = inputs_of(config, "pairs") | self._generator.identity

    def is_done(self) -> bool:
        """Whether they are all there."""
        return is_to_skip(self.folder, self.inputs, leads=self._leads)

    @cached_property
    def _maker(self) -> PairMaker:
        return PairMaker(self._config, self._generator, digest(repr(sorted(self.inputs.items()))))

    @cached_property
    def corpus(self) -> Corpus:
        """The documents, the same for all processes. An accelerator gets its model and programs meanwhile."""
        config = self._config
        # On a CPU the reading needs the cores; several processes must do the same in one order.
        ahead = jax.default_backend() != "cpu" and jax.process_count() == 1
        with beside(self._maker.compiling() if ahead else ()):
            corpus = read_corpus(config.corpus, self._generator.tokenizer, config.seed, quiet=self._quiet)
        check_agreed({"documents": corpus.documents.digest})
        return corpus

    def make(self, writer: Writer | None, folder: AnyPlace, part: range) -> None:
        """Adds to the writer, if there is one, those of a part of the documents, whole groups, that it has not yet."""
        documents, maker = self.corpus.documents[: part.stop], self._maker
        finished = int(agreed(0 if writer is None else _resume(writer, documents.ids[part.start :], folder)))
        quiet = self._quiet or not self._leads
        with progress("pairs", len(part) - finished, "documents", quiet=quiet) as report:
            for document, record, counts in maker.made(documents, part.start + finished):
                if writer is not None:
                    writer.add(document.id, record, counts)
                report.advance(1)

    def finish(self, writer: Writer, dropped: Mapping[str, int]) -> None:
        """Marks the stage done, says what came of it, and warns where that is little."""
        summary = summary_of(writer.counts, dropped)
        if not summary["pairs"]:
            raise InputError(f"{self.folder}: expected pairs, got none: {summary_line(summary)}. {lost(summary)}")
        writer.finish(summary)
        if not self._quiet:
            say(f"pairs: {summary_line(summary)}")
        config = self._config
        rows = summary["turns" if objective_of(config.objective.name).row == "turn" else "pairs"] * config.train.epochs
        if (few := warning(config, rows, summary)) is not None:
            say(f"longpo: {few}")


def _join(writer: Writer, places: Sequence[AnyPlace], folder: AnyPlace) -> None:
    """Adds what all shares have in their order, as one run writes it; goes on where that was interrupted."""
    there = iter(tuple(writer.finished))
    for place in places:
        for id, record, counts in written(place):
            if (finished := next(there, None)) is None:
                writer.hold(id, record, counts)
            elif finished != id:
                raise InputError(f"{folder}: expected the document {id}, got {finished}: delete it")


def _resume(writer: Writer, ids: Sequence[str], folder: AnyPlace) -> int:
    """How many documents are finished. They must be the first ones of these."""
    for count, (finished, found) in enumerate(zip_longest(writer.finished, ids), start=1):
        if finished is None:
            return count - 1
        if finished != found:
            raise InputError(
                f"{folder}: document {count} of the corpus was {finished}, is {found}: the files have changed; "
                f"choose another run folder, or delete {folder} to start again"
            )
    return len(writer.finished)
