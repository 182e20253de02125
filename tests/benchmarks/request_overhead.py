# SPDX-License-Identifier: Apache-2.0
"""What a request costs the host: a model of two small layers, with SmolLM2's tokenizer, answers about one document.

python -m tests.benchmarks.request_overhead --tokens 32768

Questions one by one, then all at once, JSON lines of the seconds that each takes and until its first token. The model
is so small that on any machine most of the time is the host's. `--profile` also prints where the engine's thread was.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import threading
import time
from pathlib import Path

from rapid_jax.config import RapidConfig
from rapid_jax.engine.request import Done, Failed, Piece, Question, Request
from rapid_jax.engine.service import RunningEngine
from rapid_jax.engine.warm_up import WarmUp
from rapid_jax.runtime.settings import defaults
from tests.benchmarks.serve_load import document


def small_model(folder: Path, positions: int) -> Path:
    """A checkpoint of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rapid_jax.model.load import open_checkpoint

    _, tokenizer = open_checkpoint("smollm2")
    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": positions}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return folder


class Asked:
    """A request's times."""

    def __init__(self, engine: RunningEngine, request: Request):
        self.start, self.first, self.end = time.perf_counter(), 0.0, 0.0
        self.ended = threading.Event()
        engine.submit(request, self.hear)

    def hear(self, event: object) -> None:
        """An event of the engine's."""
        now = time.perf_counter()
        if isinstance(event, Piece):
            self.first = self.first or now
        if isinstance(event, Done | Failed):
            self.end, self.first = now, self.first or now
            self.ended.set()
        if isinstance(event, Failed):
            raise event.error


def summary(asked: list[Asked], how: str, seconds: float) -> str:
    """A JSON line."""
    first = 1e3 * statistics.median(one.first - one.start for one in asked)
    figures = {"ms_each": round(1e3 * seconds / len(asked), 1), "first_token_ms": round(first, 1)}
    return json.dumps({"requests": len(asked), "asked": how} | figures)


def measure(engine: RunningEngine, options: argparse.Namespace) -> None:
    """Both ways to ask."""
    text = document(0, options.tokens * 5 // 7)
    questions = [Question(text, f"What is said in sentence {number}?") for number in range(options.requests)]
    requests = [Request.of(question, engine.config) for question in questions]
    for how in ("first", "one by one", "at once"):
        start, asked = time.perf_counter(), []
        for request in requests[:1] if how == "first" else requests:
            asked.append(Asked(engine, request))
            if how != "at once":
                asked[-1].ended.wait()
        for one in asked:
            one.ended.wait()
        print(summary(asked, how, time.perf_counter() - start), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the document, about")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = str(small_model(Path(folder) / "model", 2 * options.tokens + 1024))
        given = {"models.target": source, "speculation.mode": "target", "sampling.max_new_tokens": 64}
        given |= {"cache.folder": str(Path(folder) / "cache"), "sampling.temperature": 0.0}
        config = defaults(RapidConfig, [f"{name}={value}" for name, value in given.items()])
        engine = RunningEngine(config, warm=WarmUp((options.tokens,), 8, 1, ()))
        engine.warm_up(lambda line: None)
        if options.profile:
            profile, work = cProfile.Profile(), engine._work
            engine._work = lambda: profile.runcall(work)  # type: ignore[method-assign]
        engine.start()
        measure(engine, options)
        engine.drain(10)
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
