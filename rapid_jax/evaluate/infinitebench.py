# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's three English tasks over whole novels, from the files its project publishes.

Facts (OpenBMB/InfiniteBench: src/eval_utils.py, src/compute_scores.py): at most 40 new tokens for En.QA and En.MC,
1,200 for En.Sum; F1 of words, the option's letter or text, ROUGE-L-sum. The project keeps its prompts in its code, one
set a model; those here are ours and ask for the same: brief, one letter, a summary.
"""

from collections.abc import Callable

from rapid_jax.evaluate import scoring
from rapid_jax.evaluate.data_files import Record, chosen, data_of, id_of, records, tasks_of, text_of, texts_of
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace

SUITE = "infinitebench"
FILES = {"En.QA": "longbook_qa_eng", "En.MC": "longbook_choice_eng", "En.Sum": "longbook_sum_eng"}
_LETTERS = "ABCD"
_METRICS = {"En.QA": "infinitebench_qa", "En.MC": "infinitebench_choice", "En.Sum": "rouge_l_sum"}
_NEW_TOKENS = {"En.QA": 40, "En.MC": 40, "En.Sum": 1200}
_TEMPLATES = {
    "En.QA": "A book, and a question about it.\n\n{document}\n\nQuestion: {question}\n\nAnswer in a few words at most.",
    "En.MC": "A book, and a question about it.\n\n{document}\n\nQuestion: {question}\n\n"
    "One of these options is right. Answer with its letter (A, B, C or D) and nothing else.",
    "En.Sum": "A book:\n\n{document}\n\n{question}",
}


def samples(options: SuiteOptions, measure: Measure) -> list[Sample]:
    """The questions of the tasks' files, NAME.jsonl or NAME.jsonl.gz, in the folder `options.data`.

    A number of samples picks that many of each task by the seed. The options of En.MC are part of `question`, so
    retrieval looks for them, too. Raises InputError for a missing file, for one that is not the benchmark's, and for
    En.Sum without the package that scores it, before anything is read.
    """
    tasks = tasks_of(options, SUITE, tuple(FILES))
    folder = data_of(options, SUITE, f"a folder with {', '.join(f'{name}.jsonl' for name in FILES.values())}")
    paths = [_path(folder, task) for task in tasks]
    for task in tasks:
        scoring.check(_METRICS[task])
    books: dict[str, str] = {}  # a novel comes with many questions: one text for all of them
    found: list[Sample] = []
    for task, path in zip(tasks, paths, strict=True):
        rows: dict[str, Sample] = {}
        for place, record in records(path):
            sample = _sample(task, record, place, lambda text: books.setdefault(text, text))
            if rows.setdefault(sample.id, sample) is not sample:
                raise InputError(f"{place}: expected ids to differ, got {sample.id!r} again")
        all_rows = list(rows.values())
        found += [all_rows[at] for at in chosen(len(rows), options.samples, f"{options.seed}/{SUITE}/{task}")]
    return found


def _path(folder: AnyPlace, task: str) -> AnyPlace:
    name = f"{FILES[task]}.jsonl"
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: expected {name} there for the task {task}, found none; --tasks leaves tasks out")


def _sample(task: str, record: Record, place: str, shared: Callable[[str], str]) -> Sample:
    question, answers = _asked(task, record, place)
    return Sample(
        id=f"{task}/{id_of(record, 'id', place)}",
        suite=SUITE,
        task=task,
        document=shared(text_of(record, "context", place)),
        question=question,
        answers=answers,
        metric=_METRICS[task],
        max_new_tokens=_NEW_TOKENS[task],
        template=_TEMPLATES[task],
    )


def _asked(task: str, record: Record, place: str) -> tuple[str, tuple[str, ...]]:
    """(question, answers); of En.MC the answers are the right option's text and its letter."""
    answers = texts_of(record, "answer", place)
    if task == "En.Sum":
        return "Write a summary of this book.", answers
    question = text_of(record, "input", place).strip()
    if task == "En.QA":
        return question, answers
    options = texts_of(record, "options", place)
    if len(options) != len(_LETTERS):
        raise InputError(f"{place}: expected 'options' to be {len(_LETTERS)} texts, got {len(options)}")
    if answers[0] not in options:
        raise InputError(f"{place}: expected 'answer' to be one of 'options', got {answers[0]!r}")
    lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    return "\n".join([question, *lines]), (answers[0], _LETTERS[options.index(answers[0])])
