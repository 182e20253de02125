# SPDX-License-Identifier: Apache-2.0
"""What a request costs the host: a model of two small layers, with SmolLM2's tokenizer, answers about one document.

python -m tests.benchmarks.request_overhead --tokens 32768 [--documents 8 --rows 2]

Questions one by one, then all at once, JSON lines of the seconds that each takes and until its first token. The model
is so small that on any machine most of the time is the host's. `--profile` also prints where the engine's thread was;
`--slow SECONDS` every step of the engine that took so long, with the lanes there were, and all that was compiled behind
the warm-up. `--model` takes another model.
"""

import argparse
import cProfile
import functools
import json
import pstats
import statistics
import tempfile
import threading
import time
from pathlib import Path

import jax

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
    texts = [document(seed, options.tokens * 5 // 7) for seed in range(options.documents)]
    asked_about = (texts[number % len(texts)] for number in range(options.requests))
    questions = [Question(text, f"What is said in sentence {n}?") for n, text in enumerate(asked_about)]
    requests = [Request.of(question, engine.config) for question in questions]
    for how in ("first", "one by one", "at once"):
        start, asked = time.perf_counter(), []
        for request in requests[: len(texts)] if how == "first" else requests:
            asked.append(Asked(engine, request))
            if how != "at once":
                asked[-1].ended.wait()
        for one in asked:
            one.ended.wait()
        print(summary(asked, how, time.perf_counter() - start), flush=True)


def watch(engine: RunningEngine, seconds: float) -> None:
    """Prints steps of at least so many seconds, and whatever is compiled from now on."""
    step = engine.step

    @functools.wraps(step)
    def timed_step() -> None:
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
        if took >= seconds:
            lanes = [(len(lane.documents), lane.each, len(lane.running)) for lane in engine._lanes.values()]
            print(f"{took:.3f} s: lanes of (documents, rows, requests) {lanes}, {len(engine._ready)} ready", flush=True)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "compile" in event:
            print(f"{duration_secs:.3f} s: {event}", flush=True)

    engine.step = timed_step  # type: ignore[method-assign]
    jax.monitoring.register_event_duration_secs_listener(listen)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the document, about")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="questions about a document at once that are warmed up for")
    parser.add_argument("--model", help="in the place of the small one")
    parser.add_argument("--slow", type=float, metavar="SECONDS")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or str(small_model(Path(folder) / "model", 2 * options.tokens + 1024))
        given = {"models.target": source, "speculation.mode": "target", "sampling.max_new_tokens": 64}
        given |= {"cache.folder": str(Path(folder) / "cache"), "sampling.temperature": 0.0}
        config = defaults(RapidConfig, [f"{name}={value}" for name, value in given.items()])
        engine = RunningEngine(config, warm=WarmUp((options.tokens,), options.rows, options.documents, ()))
        engine.warm_up(lambda line: None)
        if options.slow is not None:
            watch(engine, options.slow)
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
