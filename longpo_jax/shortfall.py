# SPDX-License-Identifier: Apache-2.0
"""Whether there is enough to learn from: how few updates a run has, what was lost on the way to its pairs, and why."""

from collections.abc import Mapping
from typing import Any

from longpo_jax.config import LongPOConfig

FEW = 10  # updates, of which the first are a warmup and the last all but decayed to nothing
# A reason that something was left out for -> the settings that decide it.
_DECIDED_BY = {
    "too few questions, cut off": "instruct.max_new_tokens",
    "too few questions": "instruct.at_least, instruct.temperature",
    "excerpt cut out": "pairs.max_context",
    "refusal": "",
    "empty": "pairs.max_new_tokens",
    "repetitive chosen": "pairs.repeats_chosen, pairs.repetition_penalty",
    "repetitive rejected": "pairs.repeats_rejected, pairs.repetition_penalty",
    "too few words": "pairs.min_words, pairs.max_new_tokens",
    "identical answers": "pairs.temperature",
    "no excerpt": "excerpts.min_tokens, excerpts.max_tokens",
    "document too short": "corpus.min_tokens",
    "document too long": "corpus.max_tokens, corpus.longer",
    "part too short": "corpus.min_tokens",
    "beyond corpus.documents": "corpus.documents",
    "longer than a row": "train.lengths, train.tail",
}


def warning(config: LongPOConfig, rows: int, summary: Mapping[str, Any], too_long: int = 0) -> str | None:
    """One line if `rows` rows, of all epochs, make fewer than FEW updates; `summary` is that of the pairs.

    `too_long` rows are left out beside them. None if there is enough.
    """
    train = config.train
    given = rows // train.rows_per_step
    steps = given if train.max_steps is None else min(given, train.max_steps)
    if steps >= FEW:
        return None
    if given >= FEW:
        return (
            f"warning: train.max_steps = {train.max_steps} stops after {_count(steps, 'update')}: too few to learn much"
        )
    cut = "" if steps == given else f", of which train.max_steps makes {steps}"
    return (
        f"warning: {_count(rows, 'row')} in all, with train.rows_per_step = {train.rows_per_step} and train.epochs = "
        f"{train.epochs}, give {_count(given, 'update')}{cut}: too few to learn much. {lost(summary, too_long)}"
    )


def lost(summary: Mapping[str, Any], too_long: int = 0) -> str:
    """How many documents and questions were lost by the stage `pairs`, by reason, with the settings that decide it."""
    corpus, documents = _counts(summary, "corpus_dropped"), _counts(summary, "documents_dropped")
    asked, kept = _whole(summary, "excerpts"), _whole(summary, "turns")
    why = _reasons(_counts(summary, "turns_dropped"))
    told = [
        f"Of {_count(_whole(summary, 'documents'), 'document')} {_whole(summary, 'pairs')} gave a pair; of "
        f"{_count(asked, 'question')} asked for {max(asked - kept, 0)} were lost: {why}"
    ]
    # Those without a turn left have lost them by the reasons above.
    rest = {reason: count for reason, count in (corpus | documents).items() if reason != "no turn left"}
    rest |= {"longer than a row": too_long} if too_long else {}
    if rest:
        told.append(f"Left out besides: {_reasons(rest)}")
    return ". ".join(told)


def _reasons(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} x {reason}{_settings(reason)}" for reason, count in ordered if count) or "none"


def _settings(reason: str) -> str:
    names = _DECIDED_BY.get(reason, "")
    return f" ({names})" if names else ""


def _counts(summary: Mapping[str, Any], name: str) -> dict[str, int]:
    value = summary.get(name)
    return {str(key): count for key, count in value.items() if type(count) is int} if isinstance(value, dict) else {}


def _whole(summary: Mapping[str, Any], name: str) -> int:
    value = summary.get(name)
    return value if type(value) is int else 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
