# SPDX-License-Identifier: Apache-2.0
"""From how many excerpts a model's words give questions, and what it said about the others.

python -m tests.benchmarks.pair_questions --config configs/longpo/smollm2_cpu.yaml --excerpts 60 --out said.jsonl
python -m tests.benchmarks.pair_questions --config configs/longpo/smollm2_cpu.yaml --said said.jsonl

The first asks as `longpo round` does, with the config's model, corpus and sampling (`--set` changes them), and keeps
what was said, a line an excerpt. The second reads a kept file again, without a model: before and after a change of what
is read as a question. `--show` prints, of excerpts without a question (--all: of each), the words and what was read
from them.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from longpo_jax import instruct
from longpo_jax.config import InstructConfig, LongPOConfig
from longpo_jax.dialogue import Dialogue
from longpo_jax.documents import read_corpus
from longpo_jax.excerpts import excerpts_of
from longpo_jax.generator import Generator
from rapid_jax.evaluate.statistics import Cell, estimate
from rapid_jax.evaluate.summary import shown
from rapid_jax.runtime import settings
from rapid_jax.speculative.config import SamplingConfig


def main() -> None:
    options = parse()
    config = settings.load(LongPOConfig, options.config, options.set)
    if options.said:
        said = [json.loads(line) for line in options.said.read_text(encoding="utf-8").splitlines()]
    else:
        said = asked(config, options.excerpts)
    if options.out:
        options.out.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in said), encoding="utf-8")
    read = [instruct.parsed(one["text"], config.instruct) for one in said]
    for one, questions in zip(said, read, strict=True):
        if options.show and (options.all or len(questions) < config.instruct.at_least):
            print(f"=== {one['id']}, {one['tokens']} tokens{'' if one['finished'] else ', cut off'}")
            print(one["text"])
            print("---", *questions, sep="\n? ")
    print(told(read, config.instruct))


def asked(config: LongPOConfig, count: int) -> list[dict]:
    """What the model says about the first excerpts of the corpus."""
    generator = Generator(config, quiet=True)
    tokenizer, ask = generator.tokenizer, config.instruct
    documents = read_corpus(config.corpus, tokenizer, config.seed, quiet=True).documents
    cut = (
        (document, excerpt)
        for number, document in enumerate(documents)
        for excerpt in excerpts_of(document.text, tokenizer, config.excerpts, config.seed + number)[0]
    )
    excerpts = list(islice(cut, count))
    request = Dialogue(tokenizer, [instruct.request(ask)])
    begun = tokenizer.encode_template(ask.begins) if ask.begins else []
    prompts = [
        request.around(tokenizer.encode_quoted(document.text[excerpt.start : excerpt.end])) + begun
        for document, excerpt in excerpts
    ]
    sampling = SamplingConfig(temperature=ask.temperature, top_p=ask.top_p, max_new_tokens=ask.max_new_tokens)
    print(f"{len(prompts)} excerpts of {len(documents)} documents", file=sys.stderr)
    answers = generator.answers(prompts, sampling, range(config.seed, config.seed + len(prompts)))
    return [
        {
            "id": f"{document.id}:{excerpt.start}-{excerpt.end}",
            "tokens": excerpt.tokens,
            "finished": answer.finished,
            "text": ask.begins + answer.text,
        }
        for (document, excerpt), answer in zip(excerpts, answers, strict=True)
    ]


def told(read: list[list[str]], config: InstructConfig) -> str:
    """A line: the share of excerpts with enough questions, with its interval, and questions an excerpt."""
    enough = [float(len(questions) >= config.at_least) for questions in read]
    share = estimate([Cell(1.0, list(enumerate(enough)))])
    each = np.mean([len(questions) for questions in read])
    marked = np.mean([question.endswith("?") for questions in read for question in questions] or [0])
    return (
        f"{len(read)} excerpts, {shown(share)} % with at least {config.at_least} questions, {each:.2f} an excerpt of "
        f"{config.questions} asked for; {100 * marked:.0f} % of them end in a question mark"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="of longpo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--excerpts", type=int, default=60, metavar="N")
    parser.add_argument("--said", type=Path, metavar="FILE", help="of an earlier --out: no model is asked")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--all", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
