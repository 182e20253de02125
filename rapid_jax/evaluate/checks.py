# SPDX-License-Identifier: Apache-2.0
"""What would fail after the models are loaded, found before: settings that an evaluation has no use for, samples."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from rapid_jax.config import RapidConfig
from rapid_jax.evaluate import scoring
from rapid_jax.evaluate.modes import LabelledMode
from rapid_jax.evaluate.samples import Measure, Sample
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import context_of, frame
from rapid_jax.runtime.errors import InputError

_PROMPTS = ("prompts.target", "prompts.drafter")


def limited(measure: Measure, limit: int | None) -> Measure:
    """Counts for answers of at most `limit` tokens, where there is one, whatever a sample says."""
    return measure if limit is None else lambda sample: measure(replace(sample, max_new_tokens=limit))


def limit_answers(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The samples with answers of at most `limit` tokens, each of them where there are two; None: their own limits."""
    if limit is None:
        return list(samples)
    return [replace(sample, max_new_tokens=limit, then_tokens=limit) for sample in samples]


def limits_of(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Task -> the fewest and the most tokens that its answers may have."""
    found: dict[str, list[int]] = {}
    for sample in samples:
        low, high = found.get(sample.task, [sample.max_new_tokens] * 2)
        found[sample.task] = [min(low, sample.max_new_tokens), max(high, sample.max_new_tokens)]
    return found


def check_samples(samples: Sequence[Sample], suite: str) -> None:
    """Raises InputError for no samples, for one that is there twice, and for a metric that cannot be computed here."""
    twice = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if twice:
        raise InputError(
            f"--suite {suite}: expected every sample once, got {twice[0]!r} twice: a task or length twice?"
        )
    if not samples:
        raise InputError(f"--suite {suite}: expected samples, got none: check --tasks, --lengths and --data")
    for metric in dict.fromkeys(sample.metric for sample in samples):
        scoring.check(metric)


def check_prompts(samples: Sequence[Sample], modes: Sequence[LabelledMode], explicit: Collection[str]) -> None:
    """Raises InputError for a prompt that was asked for where a sample has its suite's own."""
    own = next((sample for sample in samples if sample.template is not None), None)
    for name in _PROMPTS:
        if own is not None and (name in explicit or any(name in mode.changes for mode in modes)):
            raise InputError(
                f"{name}: expected it not to be set, since {own.suite} asks {own.task} with a prompt of its own; "
                "prompts.system may be set"
            )


def check_fits(
    samples: Sequence[Sample],
    modes: Sequence[LabelledMode],
    tokenizer: Tokenizer,
    positions: int,
    made_for: RapidConfig,
) -> None:
    """Raises InputError for a sample that a mode, by its own settings, would find too long.

    `positions` are the checkpoint's. A sample that was made for a length has it under the prompts of `made_for`.
    """
    sizes: dict[str, int] = {}  # document -> tokens: modes that differ in their prompts share it
    checked = set()
    for mode in modes:
        config = mode.config
        context = context_of(config, positions)
        key = config.prompts, context, config.models.too_long, mode.limit
        if key in checked:
            continue
        checked.add(key)
        as_made = config.prompts == made_for.prompts and mode.limit is None
        for sample in samples:
            if as_made and sample.length is not None and sample.length <= context:
                continue
            template = sample.template or config.prompts.target
            how = config.prompts.system, sample.begins
            around = frame(tokenizer, template, sample.question, *how, thinking=config.prompts.enable_thinking).size
            around += mode.limit or sample.max_new_tokens
            if sample.document not in sizes:
                sizes[sample.document] = len(tokenizer.encode_quoted(sample.document))
            cut = config.models.too_long != "error"
            tokens = around + (1 if cut else sizes[sample.document])
            if tokens > context:
                helps = "" if cut else "; --set models.too_long=middle cuts the document"
                what = "around the document, the answer among them" if cut else "with the answer"
                raise InputError(
                    f"{sample.id} in mode {mode.label}: expected at most {context} tokens {what}, got {tokens}{helps}"
                )
