# SPDX-License-Identifier: Apache-2.0
"""The parts of a report beside scores: settings, faults that make scores meaningless, speed, a few samples in full."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rapid_jax.evaluate import ruler
from rapid_jax.evaluate.page import Block, Bold, Heading, Table, Verbatim, text
from rapid_jax.evaluate.results import Outcome, Results, named
from rapid_jax.evaluate.statistics import FEW
from rapid_jax.evaluate.summary import acceptances, percent, speeds

_SERIOUS = 0.05  # the share of faulty samples above which scores say little
_SHOWN = 3  # samples in full of each group of tasks
# Settings that a reader wants to know of any run.
NAMED = (
    *(f"models.{name}" for name in ("target", "drafter", "encoder", "max_context", "too_long")),
    *("sampling.temperature", "speculation.gamma", "speculation.eta"),
)

# A fault -> (whether a sample has it, what is said of many that do).
_FAULTS: Mapping[str, tuple[Callable[[Outcome], bool], str]] = {
    "truncated": (lambda outcome: outcome.truncated, "documents did not fit and were cut"),
    "empty": (lambda outcome: not outcome.answer.strip(), "answers are empty"),
    "at the limit": (lambda outcome: outcome.finish_reason == "length", "answers end at their limit of tokens"),
}


def value_text(value: Any) -> str:
    """A setting's value, as settings are written."""
    return value if isinstance(value, str) else json.dumps(value)


def warnings(results: Results) -> Iterator[str]:
    """What a reader must know before the scores; nothing if all is well."""
    for faulty, said in _FAULTS.values():
        places = []
        for length in results.lengths:
            shares = {label: _share(found, faulty) for label, at, found in _groups(results) if at == length}
            serious = {label: share for label, share in shares.items() if share > _SERIOUS}
            if serious:
                place = "" if length is None else f" at {named(length)}"
                places.append(f"{_range(list(serious.values()))} %{place} ({', '.join(serious)})")
        if places:
            yield f"{said}: {'; '.join(places)}."
    if results.torn:
        yield f"a last line was not whole and is left out: {', '.join(results.torn)}."
    ids = [{outcome.id for outcome in outcomes} for outcomes in results.by_label.values()]
    common = set.intersection(*ids)
    if any(found != common for found in ids):
        yield f"modes have not answered the same samples ({len(common):,} are common to all): trust differences alone."
    asked: dict[tuple, set] = {}
    for label, outcomes in results.by_label.items():
        for outcome in outcomes:
            asked.setdefault((label, outcome.task, outcome.length), set()).add((outcome.question, outcome.answers))
    few = [questions for questions in asked.values() if len(questions) < FEW]
    if few:
        yield (
            f"{len(few):,} of {len(asked):,} scores (a task, length and mode) are of fewer than {FEW} questions, which "
            "is too few for an interval."
        )


def faults(results: Results) -> Iterator[Block]:
    """The shares of faulty samples by length and mode, bold where they are serious."""
    yield Heading("What may make scores meaningless")
    yield text("Shares of the samples in %, ", Bold("bold"), f" above {percent(_SERIOUS)}.")
    lines = []
    for label, length, found in _groups(results):
        shares = [_share(found, faulty) for faulty, _ in _FAULTS.values()]
        cells = [Bold(percent(share)) if share > _SERIOUS else percent(share) for share in shares]
        lines.append([label, named(length), f"{len(found):,}", *cells])
    yield Table(["mode", "length", "samples", *_FAULTS], lines)


def speed(results: Results) -> Iterator[Block]:
    """How fast the modes were, by length."""
    yield Heading("Speed")
    yield text(
        "Means of acceptance (in %) and tokens a round; medians of tokens/s and of the seconds of a sample. Prefill is "
        'of the samples that had their document read; "reused": all had been read before.'
    )
    lines = []
    for label, length, found in _groups(results):
        lines.append(
            [
                label,
                named(length),
                _number(statistics.fmean, acceptances(found), 1),
                _number(statistics.fmean, [o.tokens_per_round for o in found if o.tokens_per_round], 2),
                _number(statistics.median, speeds(found), 1),
                _prefill(found),
                _number(statistics.median, _seconds("decode", found), 2),
            ]
        )
    yield Table(["mode", "length", "acceptance", "tokens/round", "tokens/s", "prefill s", "decode s"], lines)


def _prefill(outcomes: Sequence[Outcome]) -> str:
    read = [outcome for outcome in outcomes if not outcome.prefix_reused]
    return _number(statistics.median, _seconds("prefill", read), 2) if read else "reused"


def _seconds(part: str, outcomes: Iterable[Outcome]) -> list[float]:
    return [outcome.seconds[part] for outcome in outcomes if part in outcome.seconds]


def samples(results: Results) -> Iterator[Block]:
    """Of each group of tasks the samples of the shortest, a middle and the longest prompt, as all modes answer them."""
    yield Heading("Samples in full")
    yield text(
        "The shortest, a middle and the longest prompt of each group of tasks. Of prompts, documents and all, only the "
        "first and the last characters are kept."
    )
    answered = {label: {o.id: o for o in outcomes} for label, outcomes in results.by_label.items()}
    for name, tasks in _task_groups(results).items():
        some = [outcome for outcome in results.by_label[results.labels[0]] if outcome.task in tasks]
        some.sort(key=lambda outcome: outcome.prompt_tokens)
        places = sorted({round(k * (len(some) - 1) / (_SHOWN - 1)) for k in range(_SHOWN)}) if some else []
        if places:
            yield Heading(name, 3)
        for place in places:
            yield from _sample(
                some[place], [found[some[place].id] for found in answered.values() if some[place].id in found]
            )


def _sample(one: Outcome, answers: Sequence[Outcome]) -> Iterator[Block]:
    where = [f"task {one.task}", f"length {named(one.length)}", f"metric {one.metric}"]
    where += [] if one.depth is None else [f"depth {percent(one.depth)} %"]
    yield Heading(one.id, 4)
    yield text(", ".join(where) + ". Question:")
    yield Verbatim(one.question)
    yield text("Right:" if len(one.answers) == 1 else f"Right ({len(one.answers)}):")
    yield Verbatim("\n".join(one.answers))
    for outcome in answers:
        told = [f"{outcome.prompt_tokens:,} prompt tokens", f"{outcome.new_tokens:,} new ones"]
        told += [f"ended by {outcome.finish_reason}"] + ["document cut"] * outcome.truncated
        yield text(Bold(f"{outcome.mode}: {percent(outcome.score)}"), f" ({', '.join(told)})")
        yield Verbatim(outcome.answer)
        if outcome.thoughts:
            yield text(f"The thoughts of {outcome.mode}, which it answered by:")
            yield Verbatim(outcome.thoughts)
    yield from _prompts([(outcome.mode, outcome.prompt_ends) for outcome in answers], "prompt")
    yield from _prompts([(outcome.mode, outcome.draft_ends) for outcome in answers], "drafter's prompt")


def _prompts(ends: Iterable[tuple[str, tuple[str, ...] | None]], name: str) -> Iterator[Block]:
    """How prompts begin and end: equal ones once, with the labels that have them."""
    labels: dict[tuple[str, ...], list[str]] = {}
    for label, both in ends:
        if both:
            labels.setdefault(both, []).append(label)
    for both, some in labels.items():
        for said, end in zip(("begins", "ends"), both, strict=True):
            yield text(f"The {name} {said} ({', '.join(some)}):")
            yield Verbatim(end)


def _task_groups(results: Results) -> dict[str, tuple[str, ...]]:
    """RULER's groups; elsewhere every task is its own."""
    if results.suite != "ruler":
        return {task: (task,) for task in results.tasks}
    return {**ruler.GROUPS, "Aggregation": ruler.AGGREGATION}


def _groups(results: Results) -> Iterator[tuple[str, int | None, list[Outcome]]]:
    """(label, length, its outcomes) where there are some."""
    for label in results.labels:
        for length in results.lengths:
            found = results.at(label, length)
            if found:
                yield label, length, found


def _share(outcomes: Sequence[Outcome], faulty: Callable[[Outcome], bool]) -> float:
    return sum(map(faulty, outcomes)) / len(outcomes)


def _range(shares: Sequence[float]) -> str:
    ends = [percent(end(shares)) for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def _number(middle: Callable[[Iterable[float]], float], values: Sequence[float], digits: int) -> str:
    return f"{middle(values):,.{digits}f}" if values else "-"
