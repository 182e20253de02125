# SPDX-License-Identifier: Apache-2.0
"""The product on the platform that JAX_PLATFORMS names, what it says as JSON:  python -m tests.gpu.product FOLDER

FOLDER holds model/ and encoder/. Answers are greedy, so that they can be judged without this platform: "answers" has by
name the prompt and the tokens of each; "cli" is what `rapid answer --json` printed; "longpo" the numbers of one update.
"""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longpo_jax.config import GenerationConfig, LongPOConfig, PairsConfig, PolicyConfig, TrainConfig
from longpo_jax.dialogue import Dialogue
from longpo_jax.generator import About, Generator
from longpo_jax.optimizer import transform_of
from longpo_jax.records import Answer, Record, Turn
from longpo_jax.reference import Scorer
from longpo_jax.samples import policy_parts
from longpo_jax.step import Sample, Step
from rapid_jax.cli import main as rapid_main
from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.model.load import load_model
from rapid_jax.rapid import Rapid
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime import settings
from rapid_jax.runtime.axes import TRAINED
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from tests.retrieval.encoders import WORDS

TOKENS = 16
DOCUMENT = "\n\n".join(" ".join(WORDS[(7 * line + at * at) % 90] for at in range(10)) for line in range(120))
QUESTIONS = ("w12 w34 w56?", "w1?", "w80 w81 w82 w83 w84?", "w40 w2?")
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=TOKENS)
# What differs from float32 in full. Each is programs of its own to compile, so few of them have much in them.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "rapid": {},
    "target, int8 keys and values": {"speculation": {"mode": "target"}, "compute": {"kv": "int8"}},
    "int4 drafter, copies on": {"models": {"drafter_weights": "int4"}, "speculation": {"lookup": "on"}},
    "bfloat16, int8 drafter, keys and values": {
        "models": {"dtype": "bfloat16", "drafter_weights": "int8"},
        "compute": {"kv": "int8"},
    },
}

PAIRS = {"plain": ("float32", False), "drafted": ("float32", True), "bfloat16": ("bfloat16", True)}  # dtype, drafted


def config_of(folder: Path, name: str) -> RapidConfig:
    base = RapidConfig(
        models=ModelsConfig(target=str(folder / "model"), encoder=str(folder / "encoder"), dtype="float32"),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(mode="lossless", gamma=3, lookup="off"),
        sampling=GREEDY,
        compute=ComputeConfig(prefill_chunk=256, attention_block=1024),
        cache=CacheConfig(folder=str(folder / f"cache-{jax.default_backend()}"), prefixes=False, programs=False),
    )
    return replace(base, **{part: replace(getattr(base, part), **some) for part, some in VARIANTS[name].items()})


def answers(folder: Path) -> dict[str, list[list[list[int]]]]:
    """name -> [prompt, answer] of each question; all questions at once, over the one document."""
    asked = [(DOCUMENT, question) for question in QUESTIONS]
    found = {}
    for name in VARIANTS:
        said = Rapid(config_of(folder, name), quiet=True).answers(asked)
        found[name] = [[answer.prompt.tokens, answer.token_ids] for answer in said]
    return found


def cli(folder: Path) -> dict[str, Any]:
    """What `rapid answer` prints about the first question."""
    config, document = (folder / f"{jax.default_backend()}.{suffix}" for suffix in ("yaml", "txt"))
    settings.save(config_of(folder, "rapid"), config)
    document.write_text(DOCUMENT)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        how = ["--config", str(config), "--document", str(document), "--json", "--quiet"]
        status = rapid_main(["answer", "--question", QUESTIONS[0], *how])
    assert status == 0
    return json.loads(told.getvalue())


def longpo_config(folder: Path, dtype: str) -> LongPOConfig:
    return LongPOConfig(
        model=PolicyConfig(source=str(folder / "model"), dtype=dtype),  # type: ignore[arg-type]
        pairs=PairsConfig(batch=4, gamma=3),
        generation=GenerationConfig(prefill_chunk=256, attention_block=1024),
        train=TrainConfig(lengths=(2048,), tail=64, rows_per_step=2, attention_block=256, logits_chunk=256),
    )


def about_one_document(folder: Path, dtype: str, drafted: bool) -> list[str]:
    """What `longpo pairs` has answered to a document's questions, plainly or drafted from a shorter text."""
    generator = Generator(longpo_config(folder, dtype), quiet=True)
    dialogues = [Dialogue(generator.tokenizer, [question]) for question in QUESTIONS]
    head = dialogues[0].before + generator.tokenizer.encode_quoted(DOCUMENT)
    drafts = [dialogue.shared(DOCUMENT[:600]) for dialogue in dialogues] if drafted else None
    tails = [dialogue.first for dialogue in dialogues]
    (answers,) = generator.answers_about([About(head, tails, drafts)], GREEDY, [range(4)])
    return [answer.text for answer in answers]


def one_update(folder: Path, dtype: str) -> dict[str, Any]:
    """The reference's sums of two documents, and the metrics of an update with them: cuDNN forward and backward."""
    config = longpo_config(folder, dtype)
    model = load_model(config.model.source, layout="stacked", dtype="float32", table=TRAINED, quiet=True)
    records = []
    for index in range(2):
        chosen, rejected = Answer(" ".join(WORDS[:9]), 9, True), Answer(" ".join(WORDS[20:26]), 6, False)
        turn = Turn((0, 300), (0, 100), "As the text says,", "what of w1?", chosen, rejected)
        text = DOCUMENT[: 3000 - 900 * index]
        records.append(Record(f"doc-{index}", "book", text, len(text), None, (turn,), index, "settings"))
    scores = Scorer(config, quiet=True).scores(records)
    step = Step(config, model.decoder, transform_of(config.optimizer, 10))
    state, total = step.start(model.decoder), None
    for record, score in zip(records, scores, strict=True):
        row = policy_parts(model.tokenizer, record, "longpo", 0).packed(2048, 64)
        references = {name: sum(score[name]) for name in ("chosen", "rejected")}
        total = step.accumulate(state, total, step.place([Sample(record.id, row, None, references)]))
    _, metrics = step.update(state, total)
    sums = [[value for name in ("chosen", "rejected") for value in score[name]] for score in scores]
    return {"sums": sums, "metrics": {name: float(np.asarray(value)) for name, value in metrics.items()}}


def main(folder: Path) -> None:
    """Prints it all."""
    said = {
        "platform": jax.default_backend(),
        "answers": answers(folder),
        "cli": cli(folder),
        "pairs": {kind: about_one_document(folder, *how) for kind, how in PAIRS.items()},
        "longpo": {dtype: one_update(folder, dtype) for dtype in ("float32", "bfloat16")},
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
