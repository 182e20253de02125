# SPDX-License-Identifier: Apache-2.0
"""What `longpo check` says of pairs that several hosts make in shares."""

from collections.abc import Sequence

from longpo_jax.config import LongPOConfig
from longpo_jax.findings import Findings
from longpo_jax.journal import is_begun
from longpo_jax.round import folder_of
from longpo_jax.shares import Shares, documents_of
from longpo_jax.stages import inputs_of, stage_in
from rapid_jax.runtime.share import Share


def add_shares(
    config: LongPOConfig, before: str, asked: Sequence[Share], documents: int | None, found: Findings
) -> None:
    """What a host makes that is asked for these shares of at most so many documents, and what shares there are already.

    Raises InputError where the shares that were begun are others, or one run has begun the pairs.
    """
    folder, batch = folder_of(config), config.pairs.batch
    shares, is_there = Shares(folder, "pairs", is_begun), folder.is_dir()
    if asked:
        count, first = asked[0].count, asked[0]
        inputs = inputs_of(config, "pairs") | {"pairs.batch": batch, "shares": count}
        if is_there:
            shares.check(inputs, stage_in(folder, "pairs"))
        sizes = None if documents is None else [len(documents_of(share, documents, batch)) for share in asked]
        name = f"share {first.index}/{count}" if len(asked) == 1 else f"shares any/{count}"
        found.add(f"{before}{name}", _size(sizes, count), f"whole groups of pairs.batch {batch}{_empty(sizes)}")
        end = (
            "its own share is done" if len(asked) == 1 else "all shares are done, those of hosts that end meanwhile too"
        )
        found.add(f"{before}this host ends when", end, "who finds all done joins them")
    if is_there and (begun := shares.begun()) is not None:
        made = begun.fields("inputs").whole("shares", least=1)
        left = ", ".join(f"{share.index}/{share.count}" for share in shares.missing(made)) or "none: to be joined"
        found.add(f"{before}shares begun", str(made), f"not done: {left}")


def _size(sizes: Sequence[int] | None, count: int) -> str:
    if sizes is None:
        return f"a part of {count}; the documents are not known"
    least, most = min(sizes), max(sizes)
    return f"at most {most:,} documents" if least == most else f"at most {least:,} to {most:,} documents each"


def _empty(sizes: Sequence[int] | None) -> str:
    empty = 0 if sizes is None else sizes.count(0)
    return f"; {empty} without a document: fewer groups than shares" if empty else ""
