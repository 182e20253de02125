# SPDX-License-Identifier: Apache-2.0
"""A long generate_until task of lm-evaluation-harness in RAPID's modes through `rapid serve`: the same answers?

rapid serve --model smollm2 --config configs/rapid/quickstart.yaml --port 8000
python -m tests.benchmarks.serve_lm_eval_tasks --url http://127.0.0.1:8000 --model smollm2 --mode rapid

The harness sends a prompt as one user message; the server takes the last paragraph as the question and retrieves from
what is before it. Each answer is asked for again without the harness: the text has to be the same, and in a mode that
retrieves the chunks must be passages of the context. The last command needs an environment with lm_eval[api]. The task
is made on the spot, nothing is downloaded. One JSON line an item, then the sum; status 1 where something differs.
"""

import argparse
import json
import os
import sys
import tempfile
import textwrap
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

NAME = "rapid_long_made_here"
TASK = f"""
    task: {NAME}
    dataset_path: json
    dataset_kwargs:
      data_files:
        test: FILE
    test_split: test
    output_type: generate_until
    doc_to_text: "Answer from the passages.\\n\\n{{{{context}}}}\\n\\nQuestion: {{{{question}}}}\\nAnswer:"
    doc_to_target: "{{{{answer}}}}"
    generation_kwargs:
      max_gen_toks: 16
      temperature: 0.0
      do_sample: false
      until: []
    metric_list:
      - metric: bypass
"""
NEEDLES = {"river crossing": "blue lantern", "old observatory": "seven copper bells", "night train": "a paper map"}
RETRIEVING = ("rapid", "lossless", "phat", "retrieval")


def items(characters: int) -> list[dict[str, str]]:
    """A fact in the middle of Python's language reference, a question about it."""
    text = "\n".join(
        topics[name].strip().replace("\n\n", "\n") for name in ("assert", "assignment", "attribute-access")
    )
    half = text[: characters // 2], text[characters // 2 : characters]
    return [
        {
            "context": f"{half[0]}\nThe sign at the {place} is {sign}.\n{half[1]}",
            "question": f"What is the sign at the {place}?",
            "answer": sign,
        }
        for place, sign in NEEDLES.items()
    ]


def through_harness(options: argparse.Namespace, data: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(prompt, answer) of each item, as the harness has them."""
    import lm_eval  # type: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # type: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / "items.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in data), encoding="utf-8")
        (folder / f"{NAME}.yaml").write_text(textwrap.dedent(TASK).replace("FILE", str(file)))
        found = lm_eval.simple_evaluate(
            model="local-chat-completions",
            model_args={"model": options.model, "base_url": f"{options.url}/v1/chat/completions"},
            tasks=[NAME],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            gen_kwargs={"mode": options.mode},
            apply_chat_template=True,
            log_samples=True,
            bootstrap_iters=0,
        )
    assert found is not None
    samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
    return [(_prompt(sample["arguments"][0][0]), sample["resps"][0][0]) for sample in samples]


def _prompt(given: Any) -> str:
    """The user's message of a chat that the harness has as a list, or as the JSON text of one."""
    messages = json.loads(given[0] if isinstance(given, tuple | list) and isinstance(given[0], str) else given)
    return messages[-1]["content"]


def directly(options: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """The server's reply to the same message."""
    body = {"model": options.model, "messages": [{"role": "user", "content": prompt}], "mode": options.mode}
    body |= {"max_tokens": 16, "temperature": 0, "seed": 1234, "stop": []}
    request = urllib.request.Request(
        f"{options.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name that the server has for its model (/v1/models)")
    parser.add_argument("--mode", default="rapid", choices=(*RETRIEVING, "target"))
    parser.add_argument("--characters", type=int, default=8000, help="of an item's context")
    options = parser.parse_args()
    data, wrong = items(options.characters), 0
    for item, (prompt, answer) in zip(data, through_harness(options, data), strict=True):
        reply = directly(options, prompt)
        choice = reply["choices"][0]
        same = choice["message"]["content"] == answer
        chunks = choice["rapid"]["citations"]
        found = all(chunk["text"] in prompt for chunk in chunks) and bool(chunks) == (options.mode in RETRIEVING)
        wrong += not (same and found)
        line = {"question": item["question"], "answer": answer, "right": item["answer"] in answer, "same": same}
        print(json.dumps(line | {"chunks": len(chunks), "in the context": found}))
    print(json.dumps({"items": len(data), "wrong": wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
