# SPDX-License-Identifier: Apache-2.0
"""RULER in the published wording and in ours: the same scores of a model, task by task?

rapid convert smollm2 OUT
python -m tests.benchmarks.ruler_wording write --tokenizer OUT --prompts PROMPTS --samples 50
python -m tests.benchmarks.ruler_wording score --prompts PROMPTS --out RUNS

`write` has lm-evaluation-harness make the prompts of the tasks that need no download, a file a task (the suite
ruler-files reads them); it needs an environment with lm_eval, wonderwords and nltk, and no model. `score` runs `rapid
evaluate` on these prompts and on ours of the same tasks and lengths, greedily, and prints both side by side with 95 %
intervals.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from rapid_jax.evaluate.results import named, read
from rapid_jax.evaluate.summary import Row, estimate, shown

# Of the harness's tasks those without running text, which would have to be downloaded.
TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
KEPT = ("input", "outputs", "gen_prefix", "max_length")
SEED = 42
CONFIG = Path(__file__).parents[2] / "configs/rapid/quickstart.yaml"
SETTINGS = {"models.layout": "stacked", "compute.prefill_chunk": 4096, "sampling.temperature": 0}


def main() -> None:
    options = parse()
    {"write": write, "score": score}[options.what](options)


def write(options: argparse.Namespace) -> None:
    """A file a task, with the prompts of each length."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from transformers import AutoTokenizer

    random.seed(SEED)  # the harness draws from the global generators
    np.random.seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    options.prompts.mkdir(parents=True, exist_ok=True)
    lengths = [int(length) for length in options.lengths.split(",")]
    for name in TASKS:
        made = [doc for length in lengths for doc in published(name, tokenizer, length, options.samples)]
        write_prompts(options.prompts, name, [{key: doc[key] for key in KEPT} for doc in made])


def published(name: str, tokenizer: Any, length: int, count: int) -> list[dict]:
    """The harness's prompts of a task, as its own `custom_dataset` of the task makes 500 of them."""
    from lm_eval.tasks.ruler import (  # type: ignore[reportMissingImports]
        cwe_utils,
        fwe_utils,
        niah_utils,
        prepare_niah,
        vt_utils,
    )

    how = {"num_samples": count, "max_seq_length": length}
    if name == "vt":
        example = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, max_seq_length=500, incremental=5)[0]
        return vt_utils.sys_vartrack_w_noise_random(tokenizer, icl_example=example, **how)
    if name in ("cwe", "fwe"):
        return (cwe_utils.sys_word_pair_random if name == "cwe" else fwe_utils.sys_kwext)(tokenizer=tokenizer, **how)
    haystack, key, value = {
        "niah_single_1": ("repeat", "words", "numbers"),
        "niah_multikey_2": ("needle", "words", "numbers"),
        "niah_multikey_3": ("needle", "uuids", "uuids"),
    }[name]
    kinds = {"type_haystack": haystack, "type_needle_k": key, "type_needle_v": value}
    filler = prepare_niah.get_haystack(type_haystack=haystack)
    return prepare_niah.generate_samples(filler, TOKENIZER=tokenizer, template=niah_utils.TEMPLATE, **kinds, **how)


def score(options: argparse.Namespace) -> None:
    """Both suites answered, and the table."""
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    settings += ["--set", f"models.target={options.target}"] if options.target else []
    words = ["--config", str(CONFIG), *settings, "--modes", "target", "--samples", str(options.samples)]
    words += ["--batch", str(min(options.samples, 16)), "--tasks", ",".join(TASKS), "--resume", "--quiet"]
    own = {"ruler-files": ["--data", str(options.prompts)], "ruler": ["--lengths", options.lengths]}
    start = (sys.executable, "-m", "rapid_jax", "evaluate")
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
    running = [
        subprocess.Popen(
            [*start, "--suite", suite, *words, *more, "--out", str(options.out / suite)],
            env=environment,
            stdout=sys.stderr,
        )
        for suite, more in own.items()
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("an evaluation failed")
    theirs, ours = (read(options.out / suite).by_label["target"] for suite in own)
    print("| task | length | published wording | ours |\n|---|---|---|---|")
    for name, length in product(TASKS, sorted({outcome.length or 0 for outcome in theirs})):
        cell = Row(name, {(name, length): 1.0})
        print(f"| {name} | {named(length)} | {shown(estimate(cell, theirs))} | {shown(estimate(cell, ours))} |")


def write_prompts(folder: Path, name: str, rows: list[dict]) -> None:
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("write", "score"))
    parser.add_argument("--prompts", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of write: a Hugging Face folder")
    parser.add_argument("--lengths", default="2048,4096", metavar="LIST")
    parser.add_argument("--samples", type=int, default=50, metavar="N", help="a task and length")
    parser.add_argument("--target", metavar="PATH", help="of score; by default the config's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of score")
    return parser.parse_args()


if __name__ == "__main__":
    main()
