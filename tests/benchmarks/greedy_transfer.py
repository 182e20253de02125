# SPDX-License-Identifier: Apache-2.0
"""What the enriched greedy rule knows: temperature 0 beside 0.3, on questions over passages and on RULER.

python -m tests.benchmarks.greedy_transfer --gold nq_gold.jsonl.gz --out runs/greedy_transfer

`rapid evaluate` runs as many processes side by side, one of a suite, a length and a few modes, each into a folder of
its own; the gold file has `question`, `answers`, `title` and `passage` a line and is also RULER's qa_1. What is there
already is not done again, so a run that --seconds has ended goes on when it is started again; with --seconds 0 only
the tables are made. They compare, over the same samples (95 % intervals of a bootstrap of questions), each mode with
the target and with retrieval at temperature 0, and where it is greedy with itself at 0.3.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rapid_jax.evaluate.results import ANSWERS, SUITE, Outcome, named, read
from rapid_jax.evaluate.summary import Row, acceptances, difference, difference_text, estimate, overall, shown

SAMPLED = "temperature=0.3"  # behind a mode's name: drawn, not greedy
GREEDY = "rapid:eta=10,rapid:eta=20"  # phat's greedy answers are the same to the letter
# In logits the transfer reaches eta at its temperature 1, and 0.3 eta where answers are drawn at 0.3.
WEAKER = "rapid:eta=2,rapid:eta=5,rapid:eta=20:transfer_temperature=0.3"
# Modes by suite; those of one text share programs, and run one after the other.
MODES = {
    "qa": (
        f"target,retrieval,target:{SAMPLED},retrieval:{SAMPLED}",
        GREEDY,
        f"rapid:eta=10:{SAMPLED},rapid:eta=20:{SAMPLED}",
        f"phat:eta=10:{SAMPLED},phat:eta=20:{SAMPLED}",
        WEAKER,
    ),
    "ruler": ("target,retrieval", GREEDY, f"rapid:eta=20:{SAMPLED},phat:eta=20:{SAMPLED}", WEAKER),
}
SETTINGS = {
    "models.layout": "stacked",
    "compute.prefill_chunk": 4096,
    "retrieval.min_tokens": 512,
    "retrieval.chunk_tokens": 128,
    "speculation.gamma": 5,
    "speculation.lookup": "off",
    "sampling.temperature": 0,
}
CONFIG = Path(__file__).parents[2] / "configs/rapid/quickstart.yaml"
QUESTIONS, PROMPTS = 96, 8  # of qa a length, of RULER a task and length


class Part(NamedTuple):
    """A run of `rapid evaluate`."""

    folder: Path
    words: tuple[str, ...]


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    squad = options.out / "squad.json"
    squad.write_text(json.dumps(in_squads_format(options.gold)))
    todo = [part for part in parts(options, squad) if options.seconds]
    ends = time.monotonic() + options.seconds
    with ThreadPoolExecutor(options.workers) as pool:
        ended = list(pool.map(lambda part: run(part, ends, options.workers), todo))
    for part, how in zip(todo, ended, strict=True):
        print(f"{part.folder.name}: {how}", file=sys.stderr)
    page = "\n\n".join(text for suite in options.suites.split(",") for text in tables(options.out, suite))
    (options.out / "tables.md").write_text(page + "\n")
    print(page)


def in_squads_format(gold: Path) -> dict:
    """The questions of the gold file as SQuAD 1.1 has them, an article a title."""
    articles: dict[str, list[dict]] = {}
    for line in (gzip.open if gold.suffix == ".gz" else open)(gold, "rt", encoding="utf-8"):
        row = json.loads(line)
        answers = [{"text": text, "answer_start": 0} for text in row["answers"]]
        asked = {"id": str(len(articles)), "question": row["question"], "answers": answers}
        articles.setdefault(row["title"], []).append({"context": row["passage"], "qas": [asked]})
    return {"version": "1.1", "data": [{"title": name, "paragraphs": those} for name, those in articles.items()]}


def parts(options: argparse.Namespace, squad: Path) -> Iterator[Part]:
    """The longest first: the others then fill the time in which these end."""
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    for name in ("target", "encoder"):
        if value := getattr(options, name):
            settings += ["--set", f"models.{name}={value}"]
    for suite in options.suites.split(","):
        data, count = (options.gold, options.questions) if suite == "qa" else (squad, options.prompts)
        words = ["--suite", suite, "--config", str(CONFIG), *settings, "--data", str(data), "--samples", str(count)]
        words += ["--batch", str(min(count, 16))]
        if suite == "ruler":
            words += ["--text", str(options.text)] if options.text else []
            words += ["--tasks", options.tasks] if options.tasks else []
        for length in sorted(map(int, options.lengths.split(",")), reverse=True):
            for number, modes in enumerate(MODES[suite]):
                folder = options.out / f"{suite}-{length}-{number}"
                yield Part(folder, (*words, "--modes", modes, "--lengths", str(length), "--out", str(folder)))


def run(part: Part, ends: float, workers: int) -> str:
    """Runs it until it ends or the time does; what came of it. What it prints is kept beside its folder."""
    left, start = ends - time.monotonic(), time.monotonic()
    if left <= 0:
        return "not begun"
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.85 / workers:.3f}"}
    command = [sys.executable, "-m", "rapid_jax", "evaluate", *part.words, "--resume", "--quiet"]
    with part.folder.with_suffix(".log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return "not done when the time was over"
    return f"exit code {code} after {time.monotonic() - start:.0f} s"


def tables(out: Path, suite: str) -> Iterator[str]:
    """Scores and differences by mode, all lengths; of RULER also by task."""
    by_label: dict[str, list[Outcome]] = {}
    for folder in sorted(out.glob(f"{suite}-*-*/")):
        if (folder / SUITE).is_file() and any(path.stat().st_size for path in folder.glob(ANSWERS)):
            for label, outcomes in read(folder).by_label.items():
                by_label.setdefault(label, []).extend(outcomes)
    if not by_label:
        yield f"## {suite}\n\nNothing yet."
        return
    labels = sorted(by_label, key=lambda label: (SAMPLED in label, label.partition("-")[0] not in ("target",), label))
    cells = list(dict.fromkeys((o.task, o.length) for outcomes in by_label.values() for o in outcomes))
    lengths = sorted({length for _, length in cells if length is not None})
    whole = overall(cells, lengths)
    head = ["mode", *map(named, lengths), "all", "less target", "less retrieval", "less itself at 0.3", "accepted, %"]
    lines = []
    for label in labels:
        accepted = acceptances(by_label[label])
        lines.append(
            [
                label,
                *(shown(estimate(overall(cells, [length]), by_label[label])) for length in lengths),
                shown(estimate(whole, by_label[label])),
                *(compared(whole, by_label, label, other) for other in ("target", "retrieval", f"{label}-{SAMPLED}")),
                f"{statistics.mean(accepted):.0f}" if accepted else "",
            ]
        )
    counts = ", ".join(f"{label} {len(by_label[label]):,}" for label in labels)
    yield f"## {suite}, scores in %\n\n{as_table(head, lines)}\n\nAnswers: {counts}."
    tasks = list(dict.fromkeys(task for task, _ in cells))
    if len(tasks) > 1:
        rows = [Row(task, overall([cell for cell in cells if cell[0] == task], lengths).weights) for task in tasks]
        scored = [[row.name, *(shown(estimate(row, by_label[label])) for label in labels)] for row in rows]
        yield f"### By task\n\n{as_table(['task', *labels], scored)}"


def compared(row: Row, by_label: dict[str, list[Outcome]], label: str, other: str) -> str:
    """The label less the other, over the samples that both have."""
    there = other in by_label and other != label
    return difference_text(difference(row, by_label[label], by_label[other])) if there else ""


def as_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gold", type=Path, required=True, metavar="FILE", help="JSON lines, plain or gzipped")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--suites", default="qa,ruler", metavar="LIST")
    parser.add_argument("--lengths", default="2048,4096,8192", metavar="LIST")
    parser.add_argument("--questions", type=int, default=QUESTIONS, metavar="N", help="of qa, a length")
    parser.add_argument("--prompts", type=int, default=PROMPTS, metavar="N", help="of RULER, a task and length")
    parser.add_argument("--tasks", metavar="LIST", help="of RULER; by default all that there is data for")
    parser.add_argument("--text", type=Path, metavar="PATH", help="what RULER's haystacks are of")
    parser.add_argument("--target", metavar="PATH", help="by default the config's")
    parser.add_argument("--encoder", metavar="PATH", help="by default the config's")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes at a time, which share a GPU")
    parser.add_argument("--seconds", type=float, default=86400.0, metavar="S", help="at most")
    return parser.parse_args()


if __name__ == "__main__":
    main()
