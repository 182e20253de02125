# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on a checkpoint through `rapid serve` and through its own transformers model: the same choices?

rapid convert smollm2 OUT
rapid serve --model OUT --port 8000
python -m tests.benchmarks.serve_lm_eval --checkpoint OUT --url http://127.0.0.1:8000

The last command needs an environment with lm_eval[api], accelerate and torch; it may be another than the server's. The
task is made on the spot, nothing is downloaded. One JSON line an item, then the sum; status 1 where a choice differs.
"""

import argparse
import json
import os
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

NAME = "rapid_made_here"
TASK = f"""
    task: {NAME}
    dataset_path: json
    dataset_kwargs:
      data_files:
        validation: FILE
    validation_split: validation
    output_type: multiple_choice
    doc_to_text: "{{{{text}}}}"
    doc_to_choice: "{{{{choices}}}}"
    doc_to_target: answer
    metric_list:
      - metric: acc
"""
ENDINGS = {
    "The capital of France is": ["Paris", "Madrid, in the south of the country", "Rome", "Oslo"],
    "Water freezes at a temperature of": ["0 degrees Celsius", "40 degrees Celsius", "one hundred degrees"],
    "A triangle has": ["three sides", "four sides", "seven sides", "no sides at all"],
    "The opposite of hot is": ["cold", "warm", "red", "loud"],
    "Bees make": ["honey", "milk", "paper money", "bread"],
    "The sun rises in the": ["east", "west", "north", "evening"],
    "In the year after 1999, which was the year": ["2000", "1998", "2011"],
    "Two plus two is": ["four", "five", "twenty-two"],
    "To cut paper one uses": ["scissors", "a spoon", "a lamp", "a pillow"],
    "The first letter of the alphabet is": ["A", "B", "Z", "Q"],
    "Fish breathe with their": ["gills", "lungs", "wings", "ears"],
    "A week has": ["seven days", "nine days", "twelve days"],
    "Die Hauptstadt von Österreich heißt": ["Wien", "Berlin", "Zürich", "Köln"],
    "def add(a, b):\n    return": ["a + b", "a * b", "None", "'a'"],
    "The largest planet of the solar system is": ["Jupiter", "Mars", "Mercury", "the Moon"],
    "Shakespeare wrote": ["Hamlet", "Faust", "the Odyssey", "War and Peace"],
}


BEFORE = "".join(f"{text} {choices[0]}.\n" for text, choices in list(ENDINGS.items())[:3])


def items() -> list[dict[str, Any]]:
    """Each beginning as it is, and behind the first three: prompts of few lengths, for each of which programs are
    compiled."""
    contexts = "", BEFORE
    return [
        {"text": context + text, "choices": choices, "answer": 0}
        for context in contexts
        for text, choices in ENDINGS.items()
    ]


def choices_of(model: str, arguments: dict[str, Any], folder: Path) -> list[list[tuple[float, bool]]]:
    """Of each item the log-likelihood of every choice, and whether greedy decoding makes it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[NAME],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
    return [[(float(value), greedy in (True, "True")) for value, greedy in one["filtered_resps"]] for one in samples]


def compare(served: list[list[tuple[float, bool]]], own: list[list[tuple[float, bool]]]) -> int:
    """Prints both; how many choices differ."""
    differ, furthest = 0, 0.0
    for item, through, direct in zip(items(), served, own, strict=True):
        picked = [max(range(len(one)), key=lambda at, one=one: one[at][0]) for one in (through, direct)]
        gap = max(abs(a[0] - b[0]) for a, b in zip(through, direct, strict=True))
        same = picked[0] == picked[1] and [a[1] for a in through] == [b[1] for b in direct]
        differ, furthest = differ + (not same), max(furthest, gap)
        line = {"text": item["text"][-40:], "served": picked[0], "hf": picked[1], "gap": round(gap, 6), "same": same}
        print(json.dumps(line, ensure_ascii=False))
    print(json.dumps({"items": len(own), "differ": differ, "largest gap": round(furthest, 6)}))
    return differ


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder that the server serves")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "items.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items()))
        (folder / f"{NAME}.yaml").write_text(textwrap.dedent(TASK).replace("FILE", str(data)))
        remote = {"model": options.checkpoint.name, "base_url": f"{options.url}/v1/completions"}
        remote |= {"tokenizer_backend": "huggingface", "tokenizer": str(options.checkpoint), "batch_size": 4}
        served = choices_of("local-completions", remote, folder)
        local = {"pretrained": str(options.checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 4}
        return int(compare(served, choices_of("hf", local, folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
