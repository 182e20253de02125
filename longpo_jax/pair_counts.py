# SPDX-License-Identifier: Apache-2.0
"""What is counted while pairs are made, and what is told of it.

Of each document: "documents", "pairs", "excerpts", "turns", "chosen_tokens", "rejected_tokens", "unfinished" (answers
cut off at their limit), and what was left out, by reason.
"""

from collections.abc import Mapping
from typing import Any

OF_DOCUMENTS, OF_TURNS, OF_TEXT = "documents dropped: ", "turns dropped: ", "text dropped: "  # before the reason


def summary_of(counts: Mapping[str, int], unread: Mapping[str, int]) -> dict[str, Any]:
    """What `done.json` says: documents = pairs + documents_dropped, excerpts = turns + turns_dropped."""
    turns = max(counts.get("turns", 0), 1)
    dropped = {
        name: {key.removeprefix(prefix): count for key, count in sorted(counts.items()) if key.startswith(prefix)}
        for name, prefix in (
            ("documents_dropped", OF_DOCUMENTS),
            ("turns_dropped", OF_TURNS),
            ("text_dropped", OF_TEXT),
        )
    }
    return {
        **{name: counts.get(name, 0) for name in ("documents", "pairs", "excerpts", "turns")},
        "chosen_tokens": counts.get("chosen_tokens", 0) / turns,
        "rejected_tokens": counts.get("rejected_tokens", 0) / turns,
        "unfinished": counts.get("unfinished", 0) / (2 * turns),
        "corpus_dropped": dict(unread),
        **dropped,
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    """The same for people."""
    kinds = ("corpus_dropped", "documents_dropped", "text_dropped", "turns_dropped")
    left = [f"{reason} {count}" for kind in kinds for reason, count in summary[kind].items()]
    return (
        f"{summary['pairs']} pairs with {summary['turns']} turns from {summary['documents']} documents; mean tokens "
        f"chosen {summary['chosen_tokens']:.0f}, rejected {summary['rejected_tokens']:.0f}, "
        f"{summary['unfinished']:.0%} unfinished; dropped: {', '.join(left) or 'nothing'}"
    )
