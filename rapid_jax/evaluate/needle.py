# SPDX-License-Identifier: Apache-2.0
"""One fact at known depths of running text of known lengths: the heat map of what a model finds where."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rapid_jax.evaluate import haystack, word_lists
from rapid_jax.evaluate.data_files import tasks_of
from rapid_jax.evaluate.haystack import Burial
from rapid_jax.evaluate.ruler_hidden import stand
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime.errors import InputError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (4096, 8192)
SAMPLES = 5  # a cell
_NEAR = 16  # tokens; sentences are longer


def samples(options: SuiteOptions, measure: Measure) -> Iterator[Sample]:
    """Length by length, depth by depth, `options.samples` (5) each; ids are needle/LENGTH/DEPTH/NUMBER.

    Each measures exactly its length. `depth` is the cell's: the share of the filler's tokens before the needle, met to
    within a sentence. Raises InputError at once for what is wrong with the options, and while samples are made for a
    length that cannot hold the prompt.
    """
    tasks_of(options, "needle", ("needle",))
    outside = [depth for depth in options.depths if not 0 <= depth <= 1]
    if outside:
        raise InputError(f"depths: expected 0 (the start) to 1 (the end), got {outside[0]}")
    count = SAMPLES if options.samples is None else options.samples
    lengths, depths = options.lengths or LENGTHS, options.depths or DEPTHS
    haystack.positive("samples", [count])
    haystack.positive("lengths", lengths)
    text = haystack.running_text(options.text)
    return (
        _made(length, depth, number, options.seed, text, measure)
        for length, depth, number in product(lengths, depths, range(count))
    )


def _made(length: int, depth: float, number: int, seed: int, text: str, measure: Measure) -> Sample:
    blank = Sample(
        id=f"needle/{length}/{depth:g}/{number}",
        suite="needle",
        task="needle",
        document="",
        question="",
        answers=(),
        metric="ruler_all",
        max_new_tokens=32,
        length=length,
        template="{document}\n\n{question} Answer with the number alone.",
        depth=depth,
    )
    for attempt in range(haystack.ATTEMPTS):
        rng = random.Random(f"{seed}/{blank.id}/{attempt}")
        key, value = word_lists.key(rng), word_lists.number(rng)
        asked = replace(blank, question=f"What is the number of the house {key}?", answers=(value,))
        at = haystack.sentence_start(text, rng.randrange(len(text)))
        sample = _placed(asked, text, at, f"The number of the house {key} is {value}. ", depth, measure)
        if sample is not None and stand(sample.document, {key: 1, value: 1}):
            return sample
    raise haystack.not_found(blank)


def _placed(blank: Sample, text: str, at: int, needle: str, depth: float, measure: Measure) -> Sample | None:
    """`blank` with the needle at `depth` of the filler's tokens; None: draw again."""
    burial = Burial(blank, text, [needle], [depth], measure)
    size = burial.size(at)
    if size is None or depth in (0, 1):
        return burial.cut(at, size)
    # Text is denser here than there: the place is where the tokens before it are counted to be enough.
    tokens = burial.length - burial.least
    place, low, high = round(depth * size), (0, 0), (size, tokens)
    for _ in range(4):
        before = measure(Burial(blank, text, [needle], [1], measure).sample(at + place, place)) - burial.least
        if abs(before - depth * tokens) <= _NEAR:
            break
        low, high = ((place, before), high) if before < depth * tokens else (low, (place, before))
        place = low[0] + round((depth * tokens - low[1]) * (high[0] - low[0]) / max(high[1] - low[1], 1))
    return burial.cut(at, size, [place])
