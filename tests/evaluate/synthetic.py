# SPDX-License-Identifier: Apache-2.0
"""Folders of evaluations as a run leaves them, with scores that are chosen."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

SETTINGS = {
    "models": {"target": "big", "drafter": "small", "encoder": "minilm", "max_context": None, "too_long": "error"},
    "retrieval": {"min_tokens": 4096},
    "speculation": {"gamma": 10, "eta": 10.0},
    "sampling": {"temperature": 0.0},
    "stop": ["\n"],
}


def line(task: str, length: int | None, number: int, mode: str, score: float, **more) -> dict:
    """A sample's line; its answer is right where the score is 1."""
    drafts = mode.startswith(("rapid", "lossless", "sd"))
    size = length or 3000
    found = {
        "schema": 1,
        "id": f"{task}/{length}/{number}",
        "suite": "qa",
        "task": task,
        "length": length,
        "depth": None,
        "tags": {},
        "mode": mode,
        "metric": "contains",
        "score": score,
        "answer": "The word is blue." if score == 1 else "I do not know.",
        "thoughts": "",
        "answers": ["blue"],
        "question": f"What is word {number} of {task}?",
        "prompt_hash": f"{mode}{number}",
        "prompt_ends": ["<s>user", f"word {number}?</s>"],
        "draft_ends": ["<s>chunks", f"word {number}?</s>"] if drafts else None,
        "prompt_tokens": size - 20,
        "document_tokens": size - 100,
        "truncated": False,
        "finish_reason": "stop",
        "new_tokens": 6,
        "chunks": [],
        "draft_tokens": 900 if drafts else 0,
        "acceptance": 0.75 if drafts else None,
        "tokens_per_round": 3.5 if drafts else 1.0,
        "tokens_per_second": (60.0 if drafts else 30.0) * 4096 / size,
        "prefix_reused": False,
        "seconds": {"retrieval": 0.1, "prefill": size / 4096, "decode": 0.5},
        "settings": {},
    }
    return found | more


def folder(
    path: Path, by_label: Mapping[str, Iterable[dict]], suite: str = "qa", settings: Mapping | None = None, **options
) -> Path:
    """A run's folder with these lines, which become the suite's."""
    path.mkdir(parents=True, exist_ok=True)
    said = {"suite": suite, "options": {"seed": 0, **options}, "templates": "our own", "samples": 40, "digest": "d"}
    (path / "suite.json").write_text(json.dumps(said | {"settings": settings or SETTINGS}))
    for label, lines in by_label.items():
        text = "".join(json.dumps(one | {"suite": suite}) + "\n" for one in lines)
        (path / f"answers-{label}.jsonl").write_text(text, encoding="utf-8")
    return path


def grid(
    mode: str,
    right: Callable[[str, int, int], bool],
    tasks: Iterable[str] = ("task",),
    lengths: Iterable[int | None] = (4096, 8192),
    count: int = 20,
    **more,
) -> list[dict]:
    """`count` samples a task and length; `right` of (task, length, number) says which are answered."""
    return [
        line(task, length, number, mode, float(right(task, length or 0, number)), **more)
        for task in tasks
        for length in lengths
        for number in range(count)
    ]
