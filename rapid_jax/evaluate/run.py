# SPDX-License-Identifier: Apache-2.0
"""An evaluation: samples of a suite answered in modes and scored, each answer on disk as soon as it is there.

    DIR/suite.json            the suite and its options, the settings that decide answers, whose templates
    DIR/settings.yaml         the settings
    DIR/answers-LABEL.jsonl   a line a finished sample; of a share I/N answers-LABEL.I-of-N.jsonl

A run that goes on answers what has no line yet.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.evaluate import results
from rapid_jax.evaluate.modes import LabelledMode
from rapid_jax.evaluate.samples import Measure, Sample
from rapid_jax.evaluate.scoring import score
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import Prompt, Reading, frame
from rapid_jax.rapid import Rapid
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, replace_file
from rapid_jax.runtime.mesh import check_agreed
from rapid_jax.runtime.progress import progress


@dataclass(frozen=True)
class Share:
    """Which samples are this run's: number % count == index."""

    index: int = 0
    count: int = 1

    @property
    def ending(self) -> str:
        """Of the names of its files."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"


def measure_of(config: RapidConfig, tokenizer: Tokenizer) -> Measure:
    """Tokens of a sample's whole prompt as the target reads it, and of the longest answer."""

    def measure(sample: Sample) -> int:
        template = sample.template or config.prompts.target
        around = frame(tokenizer, template, sample.question, config.prompts.system, sample.begins)
        return around.size + len(tokenizer.encode_quoted(sample.document)) + sample.max_new_tokens

    return measure


class Answers:
    """The lines of one mode on disk, and which samples have one. Raises InputError for a file that is damaged."""

    def __init__(self, folder: Path, label: str, share: Share):
        self._path = folder / f"answers-{label}{share.ending}.jsonl"
        self.finished: set[str] = set()
        if self._path.is_file():
            lines = self._path.read_bytes().split(b"\n")
            if lines[-1]:  # torn when the run was killed
                with open(self._path, "rb+") as file:
                    file.truncate(self._path.stat().st_size - len(lines[-1]))
            for number, line in enumerate(lines[:-1], start=1):
                try:
                    self.finished.add(json.loads(line)["id"])
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{self._path}:{number}: expected an answer, got one with {error}") from error

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends them. Raises InputError if the disk is full: what was there stays."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with open(self._path, "ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with open(self._path, "rb+") as file:
                file.truncate(size)
            raise InputError(f"{self._path}: an answer could not be written: {error.strerror}") from error


def begin(folder: Path, described: Mapping[str, Any], config: RapidConfig, *, resume: bool) -> None:
    """Makes the folder of a run, or checks that it is that of this one.

    Raises InputError if there is a run that is not to be resumed, or another one.
    """
    path = folder / results.SUITE
    described = json.loads(json.dumps(dict(described), default=str))
    if path.is_file():
        if not resume:
            raise InputError(f"{folder}: expected a folder without an evaluation, got one: --resume goes on with it")
        there = json.loads(path.read_text(encoding="utf-8"))
        for key in (*described, *there):
            if described.get(key) != there.get(key):
                raise InputError(
                    f"{folder} was begun with {key} = {json.dumps(there.get(key)):.80}, expected "
                    f"{json.dumps(described.get(key)):.80}: choose another --out"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(config, folder / results.SETTINGS)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def decides(config: RapidConfig) -> dict[str, Any]:
    """The settings that decide answers: not where models lie on devices, nor caches."""
    plain = dataclasses.asdict(config)
    return {name: plain[name] for name in ("models", "retrieval", "speculation", "sampling", "prompts", "stop")}


def evaluate(
    rapid: Rapid,
    samples: Sequence[Sample],
    modes: Sequence[LabelledMode],
    folder: Path,
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
    share = share or Share()
    files = {mode.label: Answers(folder, mode.label, share) for mode in modes}
    mine = [sample for number, sample in enumerate(samples) if number % share.count == share.index]
    left = [(mode.label, s.id) for mode in modes for s in mine if s.id not in files[mode.label].finished]
    check_agreed("samples to answer", left, batch)
    ready: dict[tuple[str, int], Rapid] = {}
    with progress("evaluate", len(left), "answers", quiet=quiet or not leads) as report:
        for group in _groups(mine, batch):
            for mode in modes:
                todo = [sample for sample in group if sample.id not in files[mode.label].finished]
                if not todo:
                    continue
                key = mode.label, todo[0].max_new_tokens
                if key not in ready:
                    sampling = replace(mode.config.sampling, max_new_tokens=todo[0].max_new_tokens)
                    ready[key] = rapid.with_config(replace(mode.config, sampling=sampling))
                lines = _answered(ready[key], todo, mode)
                if leads:
                    files[mode.label].add(lines)
                report.advance(len(todo))


def _groups(samples: Sequence[Sample], batch: int) -> Iterator[list[Sample]]:
    """Consecutive samples of one task and length, at most `batch` at a time."""

    def kind(sample: Sample) -> tuple:
        return sample.task, sample.length, sample.max_new_tokens, sample.then is None, sample.then_tokens

    for _, group in groupby(samples, kind):
        together = list(group)
        yield from (together[start : start + batch] for start in range(0, len(together), batch))


def _answered(rapid: Rapid, samples: Sequence[Sample], mode: LabelledMode) -> list[dict[str, Any]]:
    """The lines of samples that are answered together."""
    rapid.load()
    start = time.perf_counter()
    readings = [
        rapid.read(sample.document, sample.question, template=sample.template, begins=sample.begins)
        for sample in samples
    ]
    retrieval = (time.perf_counter() - start) / len(samples)
    seeds = [_seed(rapid.config.sampling.seed, sample.id) for sample in samples]
    answers = _together(rapid, readings, seeds)
    last = answers
    if samples[0].then is not None:
        last = _concluded(rapid, samples, answers, seeds)
    lines = []
    for sample, reading, answer, final in zip(samples, readings, answers, last, strict=True):
        line = _line(sample, reading, answer, mode, retrieval)
        if final is not answer:
            line |= {"answer": f"{answer.text}\n\n{final.text}", "finish_reason": final.finish_reason}
        lines.append(line | {"score": score(sample.metric, final.text, sample.answers)})
    return lines


def _together(rapid: Rapid, readings: Sequence[Reading], seeds: Sequence[int]) -> list[Answer]:
    """On a mesh the last one is repeated up to what `data` divides."""
    short = -len(readings) % rapid.config.mesh.data
    rows = [*readings, *[readings[-1]] * short]
    return rapid.answers(rows, [*seeds, *[seeds[-1]] * short])[: len(readings)]


def _concluded(
    rapid: Rapid, samples: Sequence[Sample], answers: Sequence[Answer], seeds: Sequence[int]
) -> list[Answer]:
    """The target's answers to the second messages, which hold the first answers and no document."""
    config = rapid.config
    speculation = replace(config.speculation, mode="target", lookup="off")
    sampling = replace(config.sampling, max_new_tokens=samples[0].then_tokens)
    alone = rapid.with_config(replace(config, speculation=speculation, sampling=sampling))
    readings = []
    for sample, answer in zip(samples, answers, strict=True):
        text = (sample.then or "").replace("{answer}", answer.text)
        messages = [{"role": "user", "content": text}]
        if config.prompts.system is not None:
            messages.insert(0, {"role": "system", "content": config.prompts.system})
        tokens = rapid.target.tokenizer.encode(rapid.target.tokenizer.chat(messages), add_special_tokens=True)
        readings.append(Reading(Prompt(tokens[:-1], tokens[-1:]), None, None, 0, truncated=False))
    return _together(alone, readings, seeds)


def _line(sample: Sample, reading: Reading, answer: Answer, mode: LabelledMode, retrieval: float) -> dict[str, Any]:
    told, chosen = answer.to_json(), answer.selection
    prompt = reading.short if mode.config.speculation.mode == "retrieval" and reading.short else reading.long
    copied = ("id", "suite", "task", "length", "depth", "metric", "question")
    return {
        "schema": results.SCHEMA,
        **{name: getattr(sample, name) for name in copied},
        "tags": dict(sample.tags),
        "answers": list(sample.answers),
        "mode": mode.label,
        "settings": mode.changes,
        "answer": answer.text,
        "prompt_hash": digest(",".join(map(str, prompt.tokens))),
        "prompt_tokens": answer.target_tokens,
        "document_tokens": answer.document_tokens,
        "truncated": reading.truncated and mode.config.speculation.mode != "retrieval",
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
        "seconds": {"retrieval": retrieval, **answer.seconds},
    }


def _seed(seed: int, sample: str) -> int:
    """A sample's own, the same in every mode."""
    return int(digest(str(seed), sample)[:8], 16)
