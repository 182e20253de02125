# SPDX-License-Identifier: Apache-2.0
"""RULER: 13 tasks that are made, at any length, from a seed (arXiv 2404.06654; its code is Apache-2.0).

Tasks, counts, answers, metrics and tokens to generate are the benchmark's; the words of prompts, keys and the text of
haystacks are ours or the user's, so scores stand beside published ones as an order of size, not to the point.
"""

import random
from collections.abc import Iterator
from itertools import product

from rapid_jax.evaluate import haystack, ruler_counting, ruler_hidden, ruler_qa
from rapid_jax.evaluate.data_files import tasks_of
from rapid_jax.evaluate.ruler_hidden import NIAH
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime.errors import InputError

QA = ("qa_1", "qa_2")
TASKS = (*NIAH, "vt", "cwe", "fwe", *QA)
# The groups whose plain mean is the average of LongPO's main table; cwe and fwe are in none of them, they count in the
# mean of all 13 tasks alone.
GROUPS = {"NIAH": tuple(NIAH), "VT": ("vt",), "QA": QA}
AGGREGATION = ("cwe", "fwe")

LENGTHS = (4096, 8192)
SAMPLES = 25  # a task and length; RULER takes 500
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(NIAH, 128)


def samples(options: SuiteOptions, measure: Measure) -> Iterator[Sample]:
    """Task by task, length by length, `options.samples` (25) each; ids are TASK/LENGTH/NUMBER.

    Running text (niah_single, multikey_1, multivalue, multiquery, vt, qa) measures exactly its length; key-value lines
    and lists of words measure at most that, and one unit more would be too long. `options.text` is the haystacks' text
    (haystack.running_text); `options.data` has the questions of qa_1 and qa_2 (ruler_qa.read), which are left out
    without it unless they are named; where a file has fewer questions than samples, all of it are taken. The depth is
    that of the first needle that is asked for. Raises InputError at once for what is wrong with the options, and while
    samples are made for a length that cannot hold its task.
    """
    tasks_of(options, "ruler", TASKS)
    count = SAMPLES if options.samples is None else options.samples
    lengths = options.lengths or LENGTHS
    haystack.positive("samples", [count])
    haystack.positive("lengths", lengths)
    known = ruler_qa.read(options.data) if not options.tasks or set(options.tasks) & set(QA) else {}
    missing = [task for task in options.tasks if task in QA and task not in known]
    if missing:
        raise InputError(
            f"{missing[0]}: expected data, the benchmark's file or a folder with {ruler_qa.FILES[missing[0]]}, "
            f"got {options.data or 'none'}"
        )
    tasks = options.tasks or tuple(task for task in TASKS if task not in QA or task in known)
    text = haystack.running_text(options.text)
    return _made(tasks, lengths, count, options.seed, text, known, measure)


def metric_of(task: str) -> str:
    """The name in scoring.METRICS of what the benchmark counts."""
    return "ruler_part" if task in QA else "ruler_all"


def _made(
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    count: int,
    seed: int,
    text: str,
    known: dict[str, ruler_qa.Paragraphs],
    measure: Measure,
) -> Iterator[Sample]:
    for task, length in product(tasks, lengths):
        questions = ruler_qa.questions(known[task], seed, task, count) if task in QA else None
        for number in range(count if questions is None else len(questions)):
            blank = _blank(task, length, number)
            for attempt in range(haystack.ATTEMPTS):
                rng = random.Random(f"{seed}/{task}/{length}/{number}/{attempt}")
                if questions is not None:
                    sample = ruler_qa.asked(blank, rng, known[task], questions[number], measure)
                else:
                    sample = _draw(blank, rng, text, measure)
                if sample is not None:
                    yield sample
                    break
            else:
                raise haystack.not_found(blank)


def _draw(blank: Sample, rng: random.Random, text: str, measure: Measure) -> Sample | None:
    """One try at a sample of a task without data."""
    if blank.task in NIAH:
        return ruler_hidden.niah(blank, rng, text, measure)
    if blank.task == "vt":
        return ruler_hidden.variables(blank, rng, measure)
    if blank.task == "cwe":
        return ruler_counting.common_words(blank, rng, text, measure)
    return ruler_counting.coded_words(blank, rng, measure)


def _blank(task: str, length: int, number: int) -> Sample:
    return Sample(
        id=f"{task}/{length}/{number}",
        suite="ruler",
        task=task,
        document="",
        question="",
        answers=(),
        metric=metric_of(task),
        max_new_tokens=NEW_TOKENS[task],
        length=length,
    )
