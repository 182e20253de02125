# SPDX-License-Identifier: Apache-2.0
"""An evaluation: samples of a suite answered in modes and scored. A run that goes on answers what has no line yet."""

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rapid_jax.answer import Answer
from rapid_jax.config import ATTENDED, RapidConfig
from rapid_jax.engine.request import Question, Tokens
from rapid_jax.evaluate.folder import open_answers
from rapid_jax.evaluate.modes import LabelledMode
from rapid_jax.evaluate.outcome import SCHEMA
from rapid_jax.evaluate.results import finished
from rapid_jax.evaluate.samples import Measure, Sample
from rapid_jax.evaluate.scoring import score
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import frame, message
from rapid_jax.rapid import Rapid
from rapid_jax.runtime.agreement import check_agreed
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace

NOW = datetime.datetime(2025, 1, 1)  # for templates that write the date: a sample has the same prompt on any day
_SHOWN = 300  # characters of a prompt's ends, which so many tokens hold


def measure_of(config: RapidConfig, tokenizer: Tokenizer) -> Measure:
    """Tokens of a sample's whole prompt as the target reads it, and of the longest answer; `tokenizer` is dated NOW."""
    tokenizer.now = NOW

    def measure(sample: Sample) -> int:
        template = sample.template or config.prompts.target
        how = config.prompts.system, sample.begins
        around = frame(tokenizer, template, sample.question, *how, thinking=config.prompts.enable_thinking)
        return around.size + len(tokenizer.encode_quoted(sample.document)) + sample.max_new_tokens

    return measure


def decides(config: RapidConfig, limit: int | None = None) -> dict[str, Any]:
    """The settings that decide answers: not where models lie on devices, nor caches.

    max_new_tokens is among them only as the `limit` of all answers; without one the samples have their own.
    """
    plain = dataclasses.asdict(config)
    found = {name: plain[name] for name in ("models", "retrieval", "speculation", "sampling", "prompts", "stop")}
    del found["sampling"]["max_new_tokens"]
    if config.models.drafter != ATTENDED:  # they change nothing; folders from before them go on
        del found["speculation"]["attended_tokens"], found["speculation"]["attended_rounds"]
    if not config.prompts.enable_thinking:  # left out where it changes nothing: folders from before it go on
        del found["prompts"]["enable_thinking"]
    if config.compute.kv != "full":  # likewise
        found["kv"] = config.compute.kv
    return found if limit is None else found | {"sampling": found["sampling"] | {"max_new_tokens": limit}}


def evaluate(
    rapid: Rapid,
    samples: Sequence[Sample],
    modes: Sequence[LabelledMode],
    folder: AnyPlace,
    *,
    share: Share | None = None,
    batch: int = 1,
    leads: bool = True,
    quiet: bool = False,
) -> None:
    """Answers every sample in every mode that has no line yet; `batch` samples of a task and length at once.

    The modes of a group follow each other: the document's prefill serves all that read it. Every process of a run
    computes, the one that `leads` writes.
    """
    share = share or Share()  # which samples are this run's: number % count == index
    mine = _order([sample for number, sample in enumerate(samples) if number % share.count == share.index])
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(open_answers(folder, [mode.label for mode in modes], share, leads=leads))
        there = finished(folder, samples[0].suite) if samples else {}
        done = {mode.label: there.get(mode.label, set()) for mode in modes}
        left = [(mode.label, s.id) for mode in modes for s in mine if s.id not in done[mode.label]]
        check_agreed({"batch": batch, "answers that are there already": (len(left), left)})
        report = stack.enter_context(progress("evaluate", len(left), "answers", quiet=quiet or not leads))
        unfinished = {label for label, _ in left}
        for mode in modes:
            if mode.label in unfinished:
                _dated(rapid, mode.config)
        for group in _groups(mine, batch):
            for mode in modes:
                todo = [sample for sample in group if sample.id not in done[mode.label]]
                if not todo:
                    continue
                sampling = replace(mode.config.sampling, max_new_tokens=mode.limit or todo[0].max_new_tokens)
                config = replace(mode.config, sampling=sampling)
                others = _others(mine, todo) if mode.unrelated else None
                files[mode.label].add(_answer(rapid, config, todo, mode, others))
                report.advance(len(todo))
        for file in files.values():
            file.finish()


def _dated(rapid: Rapid, config: RapidConfig) -> None:
    """Loads what these settings need; its templates write the date of evaluations."""
    rapid.load(config)
    for model in (rapid.target, *([rapid.drafter] if config.speculation.drafts else [])):
        model.tokenizer.now = NOW


def _order(samples: Sequence[Sample]) -> list[Sample]:
    """Those of a task and length together; where a task has no lengths, by the size of the document."""
    first: dict[tuple, int] = {}
    for sample in samples:
        first.setdefault((sample.task, sample.length), len(first))
    sizes = {id(sample): 0 if sample.length else len(sample.document) for sample in samples}
    return sorted(samples, key=lambda sample: (first[sample.task, sample.length], sizes[id(sample)]))


def _groups(samples: Sequence[Sample], batch: int) -> Iterator[list[Sample]]:
    """Consecutive samples of one task and length, at most `batch` at a time."""

    def kind(sample: Sample) -> tuple:
        return sample.task, sample.length, sample.max_new_tokens, sample.then is None, sample.then_tokens

    for _, group in groupby(samples, kind):
        together = list(group)
        yield from (together[start : start + batch] for start in range(0, len(together), batch))


def _others(samples: Sequence[Sample], group: Sequence[Sample]) -> list[str]:
    """Of each of the group the document of the next sample that has another one; its own if there is none."""
    found = []
    for sample in group:
        at = samples.index(sample)
        turned = (*samples[at + 1 :], *samples[:at])
        found.append(next((other.document for other in turned if other.document != sample.document), sample.document))
    return found


def _answer(
    rapid: Rapid, config: RapidConfig, samples: Sequence[Sample], mode: LabelledMode, others: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The lines of samples that are answered together; what is retrieved comes from `others`, if there are any."""
    prompts = [
        Question(
            sample.document,
            sample.question,
            template=sample.template,
            begins=sample.begins,
            retrieve_from=None if others is None else others[index],
        )
        for index, sample in enumerate(samples)
    ]
    seeds = [_seed(config.sampling.seed, sample.id) for sample in samples]
    answers = rapid.answers(prompts, settings=config, seeds=seeds)
    last = answers if samples[0].then is None else _concluded(rapid, config, samples, mode, answers, seeds)
    lines = []
    for sample, answer, final in zip(samples, answers, last, strict=True):
        line = _line(sample, answer, mode, rapid)
        if final is not answer:
            seconds = {name: value + final.seconds.get(name, 0.0) for name, value in line["seconds"].items()}
            cut = "length" in (answer.finish_reason, final.finish_reason)
            line |= {"thoughts": answer.text, "answer": final.text, "finish_reason": "length" if cut else "stop"}
            line |= {"new_tokens": line["new_tokens"] + len(final.token_ids), "seconds": seconds}
        lines.append(line | {"score": score(sample.metric, final.text, sample.answers)})
    return lines


def _concluded(
    rapid: Rapid,
    config: RapidConfig,
    samples: Sequence[Sample],
    mode: LabelledMode,
    answers: Sequence[Answer],
    seeds: Sequence[int],
) -> list[Answer]:
    """The target's answers to the second messages, which hold the first answers and no document."""
    speculation = replace(config.speculation, mode="target", lookup="off")
    sampling = replace(config.sampling, max_new_tokens=mode.limit or samples[0].then_tokens)
    tokenizer, system = rapid.target.tokenizer, config.prompts.system
    texts = [
        (sample.then or "").replace("{answer}", answer.text) for sample, answer in zip(samples, answers, strict=True)
    ]
    prompts = [Tokens(message(tokenizer, text, system), kept=False) for text in texts]
    return rapid.answers(prompts, settings=replace(config, speculation=speculation, sampling=sampling), seeds=seeds)


def _line(sample: Sample, answer: Answer, mode: LabelledMode, rapid: Rapid) -> dict[str, Any]:
    told, chosen, drafts = answer.to_json(), answer.selection, answer.draft_prompt
    copied = ("id", "suite", "task", "length", "depth", "metric", "question")
    return {
        "schema": SCHEMA,
        **{name: getattr(sample, name) for name in copied},
        "tags": dict(sample.tags),
        "answers": list(sample.answers),
        "mode": mode.label,
        "settings": mode.changes,
        "answer": answer.text,
        "thoughts": "",
        "prompt_ends": _ends(rapid.target.tokenizer, answer.prompt.tokens),
        "draft_ends": None if drafts is None else _ends(rapid.target.tokenizer, drafts.tokens),
        "prompt_hash": digest(",".join(map(str, answer.prompt.tokens))),
        "prompt_tokens": answer.target_tokens,
        "document_tokens": answer.document_tokens,
        "truncated": answer.truncated,
        "finish_reason": answer.finish_reason,
        "new_tokens": len(answer.token_ids),
        "chunks": [
            {"start": chunk.start, "end": chunk.end, "tokens": chunk.tokens, "score": float(similar)}
            for chunk, similar in zip(chosen.chunks, chosen.scores, strict=True)
        ]
        if chosen
        else [],
        "draft_tokens": answer.draft_tokens,
        "acceptance": told["acceptance_rate"],
        "tokens_per_round": told["tokens_per_round"],
        "tokens_per_second": told["tokens_per_second"],
        "prefix_reused": answer.prefix_reused,
        # When the first token came says how long others of the batch were waited for.
        "seconds": {name: value for name, value in answer.seconds.items() if name != "first_token"},
    }


def _ends(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The first and the last characters of a prompt as the model reads it: a slip of the template shows there."""
    head, tail = (tokenizer.decode(part, skip_special_tokens=False) for part in (tokens[:_SHOWN], tokens[-_SHOWN:]))
    return [head[:_SHOWN], tail[-_SHOWN:]]


def _seed(seed: int, sample: str) -> int:
    """A sample's own, the same in every mode."""
    return int(digest(str(seed), sample)[:8], 16)
