# SPDX-License-Identifier: Apache-2.0
"""RULER's prompts as others made them: the published wording, in the files that its generators write.

lm-evaluation-harness makes them at any length from a tokenizer (its tasks niah_*, ruler_*; arXiv 2404.06654), so a
score here stands beside the harness's to the point. Read are a task's `input`, `outputs`, `gen_prefix` and
`max_length`; metrics and tokens to generate are the benchmark's (ruler.py).
"""

from collections.abc import Iterator

from rapid_jax.evaluate import ruler
from rapid_jax.evaluate.data_files import Record, chosen, data_of, records, tasks_of, text_of, texts_of
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import shown
from rapid_jax.runtime.storage import AnyPlace

SUITE = "ruler-files"
_ENDINGS = (".jsonl", ".jsonl.gz")


def samples(options: SuiteOptions, measure: Measure) -> list[Sample]:
    """The prompts in TASK.jsonl or TASK.jsonl.gz of the folder `options.data`, those tasks that have a file.

    The target reads `input` as it stands, in one user message, and its answer begins with `gen_prefix`. What is
    retrieved from is `input` without its last line, which is the question. A number of samples picks that many of each
    task and `max_length` by the seed. Raises InputError for a folder without such a file, a named task without one, and
    a line that is no such prompt.
    """
    named = tasks_of(options, SUITE, ruler.TASKS)
    folder = data_of(options, SUITE, f"a folder with TASK.jsonl, where TASK is one of {', '.join(ruler.TASKS)}")
    files = {task: path for task in named if (path := _file(folder, task)) is not None}
    missing = [task for task in (options.tasks or named[:1]) if task not in files]
    if missing and (options.tasks or not files):
        raise InputError(f"{folder}: expected {missing[0]}.jsonl there, or the file of another task, found none")
    return [sample for task, path in files.items() for sample in _picked(task, path, options)]


def _file(folder: AnyPlace, task: str) -> AnyPlace | None:
    return next((path for ending in _ENDINGS if (path := folder / f"{task}{ending}").is_file()), None)


def _picked(task: str, path: AnyPlace, options: SuiteOptions) -> Iterator[Sample]:
    by_length: dict[int, list[Sample]] = {}
    for place, record in records(path):
        sample = _sample(task, record, place, {length: len(found) for length, found in by_length.items()})
        by_length.setdefault(sample.length or 0, []).append(sample)
    for length, found in sorted(by_length.items()):
        key = f"{options.seed}/{SUITE}/{task}/{length}"
        yield from (found[at] for at in chosen(len(found), options.samples, key))


def _sample(task: str, record: Record, place: str, numbers: dict[int, int]) -> Sample:
    length, text = record.get("max_length"), text_of(record, "input", place)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise InputError(f"{place}: expected 'max_length' to be tokens, 1 or more, got {shown(length)}")
    document, _, question = text.rpartition("\n")
    if not document.strip() or not question.strip():
        raise InputError(f"{place}: expected 'input' with the question in its last line, got {shown(text[-80:])}")
    return Sample(
        id=f"{task}/{length}/{numbers.get(length, 0)}",
        suite=SUITE,
        task=task,
        document=document,
        question=question,
        answers=texts_of(record, "outputs", place),
        metric=ruler.metric_of(task),
        max_new_tokens=ruler.NEW_TOKENS[task],
        length=length,
        template="{document}\n{question}",
        begins=text_of(record, "gen_prefix", place) if record.get("gen_prefix") else "",
    )
