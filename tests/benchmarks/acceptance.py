# SPDX-License-Identifier: Apache-2.0
"""RAPID on five real questions: acceptance, tokens a round and speed against decoding with the target alone.

    python -m tests.benchmarks.acceptance [--etas 0 5 10 20] [--gamma 4|auto] [--temperature 1] [--new-tokens 128]

Each question has its own part of the Python language reference (6K to 8K tokens of SmolLM2). With --useless the drafter
reads text about something else instead of what was retrieved. Within a question every setting runs in turn, in one
process; the speed ratio is of decoding alone, after everything is compiled. Sums over the questions are printed last.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pydoc_data.topics import topics

from rapid_jax.config import CacheConfig, ModelsConfig, RapidConfig
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig

QUESTIONS = {
    "with": "What does the with statement do, and which methods does a context manager have?",
    "class": "How does a class definition create a class object, and what are base classes?",
    "try": "What happens when an exception is raised inside a try statement that has a finally clause?",
    "import": "How does the import statement find and bind a module?",
    "lambda": "What is the difference between a lambda expression and a function definition?",
}
USELESS = "The recipe calls for two cups of flour, a pinch of salt and three eggs. Beat until smooth. " * 60
LENGTHS = (6200, 6600, 7000, 7300, 7600)  # tokens of each document, about


def document(topic: str, tokens: int, count) -> str:
    """The topic, then others in alphabetical order after it, those that still fit into the length."""
    names = sorted(topics)
    start = names.index(topic)
    text = ""
    for name in names[start:] + names[:start]:
        longer = f"{text}\n\n{topics[name].strip()}" if text else topics[name].strip()
        if count(longer) <= tokens:
            text = longer
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--etas", type=float, nargs="+", default=[0, 5, 10, 20])
    parser.add_argument("--gamma", default="4")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lookup", default="auto")
    parser.add_argument("--useless", action="store_true")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"

    from rapid_jax.engine.request import Question
    from rapid_jax.rapid import Rapid

    gamma = "auto" if arguments.gamma == "auto" else int(arguments.gamma)
    with tempfile.TemporaryDirectory() as scratch:
        base = RapidConfig(
            models=ModelsConfig(target="smollm2", too_long="error"),
            retrieval=RetrievalConfig(min_tokens=1536),
            sampling=SamplingConfig(temperature=arguments.temperature, max_new_tokens=arguments.new_tokens),
            cache=CacheConfig(folder=scratch),
        )
        rapid = Rapid(base, quiet=True)
        elsewhere = USELESS if arguments.useless else None
        plain = SpeculationConfig(mode="target", lookup="off")
        settings = {"target alone": plain}
        for eta in arguments.etas:
            settings[f"eta {eta:g}"] = SpeculationConfig(mode="rapid", eta=eta, gamma=gamma, lookup=arguments.lookup)
        totals = {name: [0, 0, 0, 0, 0.0] for name in settings}
        for (topic, question), tokens in list(zip(QUESTIONS.items(), LENGTHS, strict=True))[: arguments.questions]:
            text = document(topic, tokens, lambda text: len(rapid.target.tokenizer.encode(text)))
            for name, speculation in settings.items():
                asked = Question(text, question, retrieve_from=elsewhere)
                (answer,) = rapid.answers([asked], settings=replace(base, speculation=speculation))
                made = answer.generation
                row = (len(answer.token_ids), made.drafted[0], made.accepted[0], made.target_steps, made.decode_seconds)
                totals[name] = [a + b for a, b in zip(totals[name], row, strict=True)]
                print(f"{topic:7s} {answer.target_tokens} tokens, {name}: {_line(row)} {made.gammas}", flush=True)
    slow = totals["target alone"]
    for name, row in totals.items():
        ratio = (row[0] / row[4]) / (slow[0] / slow[4])
        print(f"all     {name}: {_line(row)}, {ratio:.2f}x the target alone")


def _line(row) -> str:
    tokens, drafted, accepted, rounds, seconds = row
    rate = f"acceptance {accepted / drafted:.2f}" if drafted else "nothing drafted"
    return f"{tokens} tokens, {tokens / seconds:.1f}/s, {rate}, {tokens / max(rounds, 1):.2f} tokens a round"


if __name__ == "__main__":
    main()
