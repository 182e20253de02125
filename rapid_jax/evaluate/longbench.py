# SPDX-License-Identifier: Apache-2.0
"""LongBench v2: 503 multiple-choice questions over long texts, from the file its project publishes.

Facts (THUDM/LongBench: pred.py, prompts/, config/): one user message; at most 128 new tokens, or 1,024 of reasoning and
then 128 for the answer, which is asked for without the text; temperature 0.1; a prompt longer than 120,000 tokens loses
its middle (models.too_long: middle with models.max_context does that here). There an empty answer is left out of the
score; here it is a wrong one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rapid_jax.evaluate.data_files import Record, chosen, data_of, id_of, records, tasks_of, text_of
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, text_in

SUITE = "longbench-v2"
DIRECT, REASONED = SUITE, f"{SUITE}-cot"
ANSWER_TOKENS, REASONING_TOKENS = 128, 1024
_LETTERS = "ABCD"
_SPLITS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
_ASKED = ("$Q$", *(f"$C_{letter}$" for letter in _LETTERS))
_MARKER = re.compile(r"\$(Q|C_[A-D]|COT)\$")
_FILES = {"direct": "0shot.txt", "reasoned": "0shot_cot.txt", "concluded": "0shot_cot_ans.txt"}


@dataclass(frozen=True)
class Templates:
    """The messages: $DOC$ is the text, $Q$ the question, $C_A$ to $C_D$ are the choices, $COT$ are thoughts."""

    direct: str
    reasoned: str  # the first of two messages: what is answered is thoughts
    concluded: str  # the second, without the text


_TEXT = "Here is a text; a question about it follows.\n\n<text>\n$DOC$\n</text>\n\n"
_QUESTION = "Question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
_FORM = 'Answer in this form, with the letter of one choice: "The correct answer is (letter)".'
OURS = Templates(
    direct=_TEXT + _QUESTION + _FORM,
    reasoned=_TEXT + _QUESTION + "Think about it step by step, and weigh every choice:",
    concluded=f"A question about a text, which is left out here, and thoughts about it.\n\n{_QUESTION}"
    f"Thoughts: $COT$\n\nWhich choice is right by these thoughts? {_FORM}",
)


def templates_of(folder: AnyPlace) -> tuple[Templates, bool]:
    """(the templates, whether they are the benchmark's own): those in folder/prompts, ours if none of them is there.

    Raises InputError if only some of the three files are there, and for one without the markers that it needs.
    """
    paths = {field: folder / "prompts" / name for field, name in _FILES.items()}
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == len(paths):
        return OURS, False
    if missing:
        raise InputError(
            f"{folder / 'prompts'}: expected {', '.join(_FILES.values())} or none, {missing[0].name} is missing"
        )
    texts = {}
    for field, path in paths.items():
        try:
            texts[field] = text_in(path, "utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        _check(texts[field], path, "$COT$" if field == "concluded" else "$DOC$")
    return Templates(**texts), True


def _check(template: str, path: AnyPlace, other: str) -> None:
    """Every marker of the question once, and `other`: $DOC$ before the question, or $COT$ behind it."""
    for marker in (*_ASKED, other):
        if template.count(marker) != 1:
            raise InputError(f"{path}: expected {marker} once, got it {template.count(marker)} times")
    first, last = (edge(map(template.index, _ASKED)) for edge in (min, max))
    if (other == "$DOC$" and template.index(other) > first) or (other == "$COT$" and template.index(other) < last):
        raise InputError(f"{path}: expected {other} {'before' if other == '$DOC$' else 'behind'} the question")
    if other == "$COT$" and "$DOC$" in template:
        raise InputError(f"{path}: expected no $DOC$: the answer to thoughts is asked for without the text")


def samples(options: SuiteOptions, measure: Measure) -> list[Sample]:
    """The questions of `options.data` (data.json or the same as JSON lines, .gz too; or the folder of data.json).

    Tasks: longbench-v2 asks for the answer, longbench-v2-cot for thoughts, and then with `then` for the answer (at most
    ANSWER_TOKENS). A number of samples picks that many by the seed, the same of both tasks. Questions and choices are
    `question`, so retrieval looks for both, and the message is the template filled in, white space at the edges of
    every field removed, as the project does. Raises InputError for a file that is not the benchmark's.
    """
    tasks = tasks_of(options, SUITE, (DIRECT, REASONED))
    path = data_of(options, SUITE, "the benchmark's data.json or the same as JSON lines")
    path = path / "data.json" if path.is_dir() else path
    templates, _ = templates_of(path.parent)
    items: dict[str, dict[str, str]] = {}
    for place, record in records(path):
        item = _item(record, place)
        if items.setdefault(item["_id"], item) is not item:
            raise InputError(f"{place}: expected ids to differ, got {item['_id']!r} again")
    rows = list(items.values())
    picked = chosen(len(rows), options.samples, f"{options.seed}/{SUITE}")
    return [_sample(task, rows[at], templates) for task in tasks for at in picked]


def _item(record: Record, place: str) -> dict[str, str]:
    """The fields of a question, checked and stripped."""
    names = ("question", *(f"choice_{letter}" for letter in _LETTERS), "answer", "context", "domain", *_SPLITS)
    item = {name: text_of(record, name, place).strip() for name in names} | {"_id": id_of(record, "_id", place)}
    for name, known in {"answer": tuple(_LETTERS), **_SPLITS}.items():
        if item[name] not in known:
            raise InputError(f"{place}: expected {name!r} of {', '.join(known)}, got {item[name]!r}")
    return item


def _sample(task: str, item: Mapping[str, str], templates: Templates) -> Sample:
    template = templates.direct if task == DIRECT else templates.reasoned
    start = min(map(template.index, _ASKED))
    end = max(template.index(marker) + len(marker) for marker in _ASKED)
    return Sample(
        id=f"{task}/{item['_id']}",
        suite=SUITE,
        task=task,
        document=item["context"],
        question=_fill(template[start:end], item),
        answers=(item["answer"],),
        metric="choice",
        max_new_tokens=ANSWER_TOKENS if task == DIRECT else REASONING_TOKENS,
        template=template[:start].replace("$DOC$", "{document}") + "{question}" + template[end:],
        tags={name: item[name] for name in (*_SPLITS, "domain")},
        then=None if task == DIRECT else _fill(templates.concluded, item),
    )


def _fill(template: str, item: Mapping[str, str]) -> str:
    """The template with a question's texts in it, {answer} for $COT$. Markers that these texts spell out stay text."""
    values = {
        "Q": item["question"],
        "COT": "{answer}",
        **{f"C_{letter}": item[f"choice_{letter}"] for letter in _LETTERS},
    }
    return _MARKER.sub(lambda match: values[match[1]], template)
