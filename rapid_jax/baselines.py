# SPDX-License-Identifier: Apache-2.0
"""One question answered three ways: by RAPID, from the whole document alone, from the retrieved text alone."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rapid_jax.answer import Answer
from rapid_jax.rapid import Rapid
from rapid_jax.speculative.config import Mode

BASELINES: tuple[Mode, ...] = ("target", "retrieval")
_HEADINGS = ("mode", "tokens/s", "acceptance", "tokens/round", "prefill s", "compile s", "decode s")


def baselines(rapid: Rapid, document: str, question: str) -> Iterator[Answer]:
    """The answers of the modes that `rapid` was not configured for: same models, sampling and document prefill.

    They decode a token at a time: prompt lookup is off, as it is in what the paper compares with.
    """
    config = rapid.config
    for mode in BASELINES:
        if mode != config.speculation.mode:
            other = replace(config, speculation=replace(config.speculation, mode=mode, lookup="off"))
            yield rapid.answer(document, question, settings=other)


def row(answer: Answer) -> dict:
    """What is compared, by the names of `Answer.to_json`."""
    every = answer.to_json()
    names = ("mode", "tokens_per_second", "acceptance_rate", "tokens_per_round", "prefix_reused", "seconds", "answer")
    return {name: every[name] for name in names}


def table(answers: Sequence[Answer], width: int) -> str:
    """Aligned columns, a line an answer, and below them every answer in full, in lines of `width` characters.

    The document is prefilled once: where an answer found that done, its prefill says "reused", and the seconds are
    those of the rest (the question and the drafter's prompt).
    """
    lines = [_HEADINGS, *(_cells(answer) for answer in answers)]
    sizes = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    figures = [_aligned(line, sizes) for line in lines]
    texts = [f"\n{answer.mode}:\n{_wrap(answer.text, width)}" for answer in answers]
    return "\n".join(figures + texts)


def _cells(answer: Answer) -> tuple[str, ...]:
    acceptance = answer.acceptance_rate
    prefill = f"{answer.seconds['prefill']:.1f}"
    return (
        answer.mode,
        f"{answer.tokens_per_second:.1f}",
        "-" if acceptance is None else f"{acceptance:.0%}",
        f"{answer.tokens_per_round:.2f}",
        f"reused + {prefill}" if answer.prefix_reused else prefill,
        f"{answer.seconds['compile']:.1f}",
        f"{answer.seconds['decode']:.1f}",
    )


def _aligned(cells: Sequence[str], sizes: Sequence[int]) -> str:
    """The mode to the left, numbers to the right."""
    mode, *numbers = cells
    figures = (number.rjust(size) for number, size in zip(numbers, sizes[1:], strict=True))
    return "  ".join([mode.ljust(sizes[0]), *figures])


def _wrap(text: str, width: int) -> str:
    """The text's own lines, broken between words where they are too long, and set in by two."""
    room = max(width - 2, 20)
    lines = (textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())
    return "\n".join(f"  {line}".rstrip() for parts in lines for line in parts or [""])
