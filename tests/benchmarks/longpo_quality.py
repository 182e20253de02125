# SPDX-License-Identifier: Apache-2.0
"""What training on long documents did to a model: a needle found in long text, and perplexity on short text.

    python -m tests.benchmarks.longpo_quality --models smollm2 RUN/export --text BOOK.txt \\
        [--lengths 4096 8192 16384 32768] [--samples 20] [--perplexity 1024 2048 4096] [--windows 32] \\
        [--rope-theta T] [--json OUT] [--plot OUT.png]
    python -m tests.benchmarks.longpo_quality --seen OUT ... [--names N ...] [--plot OUT.png]

Needle: a sentence "The secret number of the NAME is DIGITS." stands in the text at evenly spread depths, and the chat
model, greedy, is asked for the number; an answer counts if the 7 digits are in it, commas left out. A prompt has the
length's tokens or a few less, the template included. A model's own limit of positions is not enforced.
Perplexity: windows evenly spread over the text, each by itself, no template. Models with the same tokenizer read the
same windows: the change from the first model, in brackets, is of pairs of windows. Intervals are of 95 %: Wilson's for
accuracy, Student's over windows for perplexity. --rope-theta replaces the base of every model. --seen measures nothing:
it reads what --json wrote, and puts models of one name together (seeds of a run): their mean.
"""

import argparse
import json
import math
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longpo_jax.dialogue import Dialogue
from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.load import LoadedModel, load_model
from rapid_jax.model.logprobs import token_log_probs
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.files import replace_file
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.prefill import prefill

KINDS = ("copper", "silver", "wooden", "crimson", "hidden", "ancient", "marble", "velvet", "frozen", "hollow")
THINGS = ("lantern", "compass", "violin", "orchard", "teapot", "staircase", "anvil", "parrot", "windmill", "saddle")
NEW_TOKENS = 24
TOGETHER = 32768  # tokens of windows computed at once
LOGITS = 4096  # of them, logits that exist at once


class Haystack:
    """A text as tokens, of which stretches with a needle are made."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self._text, self._tokenizer = text, tokenizer
        self._spans = tokenizer.spans(text)

    def prompt(self, length: int, depth: float, seed: str) -> tuple[list[int], str]:
        """(prompt of at most `length` tokens, the digits asked for): the needle at `depth` (0 to 1) of a stretch."""
        draw = random.Random(seed)
        name, number = f"{draw.choice(KINDS)} {draw.choice(THINGS)}", str(draw.randrange(10**6, 10**7))
        needle = f" The secret number of the {name} is {number}."
        dialogue = Dialogue(self._tokenizer, [f"What is the secret number of the {name}?"])
        room = length - len(dialogue.shared(needle)) - 4
        if not 0 < room < len(self._spans):
            raise SystemExit(f"a prompt of {length} tokens: expected a text of {room} tokens, got {len(self._spans)}")
        start = draw.randrange(len(self._spans) - room)
        while True:
            stretch = self._text[self._spans[start][0] : self._spans[start + room - 1][1]]
            at = _sentence_end(stretch, int(depth * len(stretch)))
            prompt = dialogue.shared(stretch[:at] + needle + stretch[at:])
            if len(prompt) <= length:
                return prompt, number
            room -= len(prompt) - length


def _sentence_end(text: str, near: int) -> int:
    """Behind the first full stop from `near` on that a space follows, else from the start, else where a word ends."""
    for mark, first in ((". ", near), (". ", 0), (" ", near)):
        if (found := text.find(mark, first)) >= 0:
            return found + len(mark.rstrip())
    return len(text)


def needles(model: LoadedModel, haystack: Haystack, length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Which of the samples of one length were answered right."""
    start = time.perf_counter()
    depths = [(index + 0.5) / given.samples for index in range(given.samples)]
    asked = [haystack.prompt(length, depth, f"{given.seed} {index}") for index, depth in enumerate(depths)]
    calls = -(-len(asked) * length // given.batch_tokens)
    rows = -(-len(asked) // calls)  # every call has as many rows: one shape to compile
    answers: list[str] = []
    for first in range(0, len(asked), rows):
        part = [prompt for prompt, _ in asked[first : first + rows]]
        answers += _answers(model, part + part[-1:] * (rows - len(part)), given.chunk)[: len(part)]
    right = [number in answer.replace(",", "") for (_, number), answer in zip(asked, answers, strict=True)]
    samples = [
        {"depth": depth, "number": number, "answer": answer, "right": hit}
        for depth, (_, number), answer, hit in zip(depths, asked, answers, right, strict=True)
    ]
    return {
        "accuracy": sum(right) / len(right),
        "interval": wilson(sum(right), len(right)),
        "seconds": time.perf_counter() - start,  # with compiling
        "samples": samples,
    }


def _answers(model: LoadedModel, prompts: list[list[int]], chunk: int) -> list[str]:
    decoder = model.decoder
    prefix = prefill(decoder, [prompt[:-1] for prompt in prompts], chunk=chunk, dtype=decoder.embed_VD[...].dtype)
    prompted = Prompted(decoder, prompts, prefix, [len(prompt) - 1 for prompt in prompts])
    plain = SpeculationConfig(mode="target", gamma=0, lookup="off", rounds_per_read=NEW_TOKENS)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS)
    made = generate(prompted, None, speculation=plain, sampling=greedy, stops=model.tokenizer.stop_ids)
    return [model.tokenizer.decode(tokens) for tokens in made.tokens]


def wilson(hits: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, of 95 %."""
    share = hits / count
    middle, spread = share + z * z / (2 * count), z * math.sqrt((share * (1 - share) + z * z / (4 * count)) / count)
    low, high = ((middle + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def about(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, ends of its 95 % interval) of independent values."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, -math.inf, math.inf
    # Student's t at 97.5 % (Abramowitz and Stegun 26.7.5, two terms): within 2 % from 3 degrees of freedom on.
    z, free = 1.959964, count - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    spread = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - spread, mean + spread


@partial(jax.jit, static_argnames="chunk")
def _window_nll(decoder: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, *, chunk: int) -> jax.Array:
    """float32 [B]: mean of -log p over each window."""
    B, T = tokens_BT.shape
    pos_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    hidden_BTD, _ = decoder.hidden(tokens_BT, pos_BT, attend_self(pos_BT, Strategy(block=1024), runs=1))
    weight, axes = decoder.head
    log_prob_BT: Any = token_log_probs(hidden_BTD, weight, targets_BT, jnp.ones((B, T), bool), axes, chunk)
    return -jnp.mean(log_prob_BT, axis=1)


def perplexity(model: LoadedModel, tokens: np.ndarray, length: int, windows: int) -> dict[str, Any]:
    """Of windows of `length` predicted tokens each."""
    count = min(windows, (len(tokens) - 1) // length)
    if count < 1:
        raise SystemExit(f"perplexity at {length} tokens: the text has only {len(tokens)}")
    starts = np.linspace(0, len(tokens) - 1 - length, count).astype(int)
    rows = min(count, max(TOGETHER // length, 1))
    call = partial(_window_nll, model.decoder, chunk=max(min(LOGITS // rows, length), 1))
    nll: list[float] = []
    for first in range(0, count, rows):
        part = starts[first : first + rows]
        filled = np.append(part, [part[-1]] * (rows - len(part))).astype(int)
        grid = np.stack([tokens[start : start + length + 1] for start in filled])
        nll += np.asarray(call(grid[:, :-1], grid[:, 1:]))[: len(part)].tolist()
    mean, low, high = about(np.asarray(nll))
    return {"perplexity": math.exp(mean), "interval": (_exp(low), _exp(high)), "nll": nll}


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def measure(source: str, text: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    model = load_model(source, layout=given.layout, dtype=given.dtype, rope_theta=given.rope_theta, quiet=True)
    haystack = Haystack(text, model.tokenizer)
    found: dict[str, Any] = {"model": source, "rope_theta": model.config.rope.theta, "needle": {}, "perplexity": {}}
    tokens = np.asarray(model.tokenizer.encode_quoted(text), np.int32)
    for length in given.perplexity:
        found["perplexity"][length] = one = perplexity(model, tokens, length, given.windows)
        low, high = one["interval"]
        print(f"{source}: perplexity at {length} {one['perplexity']:.3f} ({low:.3f} to {high:.3f})", flush=True)
    for length in given.lengths:
        found["needle"][length] = one = needles(model, haystack, length, given)
        print(f"{source}: needle at {length} {_share(one)}, {one['seconds']:.1f} s; {_said(one)}", flush=True)
    return found


def _said(one: dict[str, Any]) -> str:
    sample = one["samples"][len(one["samples"]) // 2]
    return f"asked for {sample['number']}, said {sample['answer']!r}"


def _share(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['accuracy']:.0%} ({low:.0%} to {high:.0%})"


def table(results: list[dict[str, Any]]) -> str:
    """A row a measure, a column a model."""
    rows = [["", *(f"{one['model']} (theta {one['rope_theta']:g})" for one in results)]]
    for length in results[0]["needle"]:
        rows.append([f"needle at {length}", *(_share(one["needle"][length]) for one in results)])
    for length in results[0]["perplexity"]:
        base = np.asarray(results[0]["perplexity"][length]["nll"])
        cells = [f"{results[0]['perplexity'][length]['perplexity']:.3f}"]
        for one in results[1:]:
            mine = one["perplexity"][length]
            change, low, high = (math.expm1(x) if x < 700 else x for x in about(np.asarray(mine["nll"]) - base))
            cells.append(f"{mine['perplexity']:.3f} ({change:+.2%}, {low:+.2%} to {high:+.2%})")
        rows.append([f"perplexity at {length}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def pooled(results: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """One result a name: the mean of its models' needles, perplexities of the first.

    Its models read the same prompts, so intervals are those of one model that was right as often.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        same = [one for one, other in zip(results, names, strict=True) if other == name]
        needle = {}
        for length, first in same[0]["needle"].items():
            count = len(first["samples"])
            share = float(np.mean([one["needle"][length]["accuracy"] for one in same]))
            needle[length] = {"accuracy": share, "interval": wilson(share * count, count)}
        found[name] = same[0] | {"model": name, "needle": needle}
    return list(found.values())


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Needles found against length, a line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for index, one in enumerate(results):
        lengths = [int(length) for length in one["needle"]]
        share = np.asarray([needle["accuracy"] for needle in one["needle"].values()])
        low, high = np.asarray([needle["interval"] for needle in one["needle"].values()]).T
        shifted = np.asarray(lengths) * 1.02 ** (index - len(results) / 2)
        spread = 100 * np.stack([share - low, high - share])
        axes.errorbar(shifted, 100 * share, spread, marker="o", capsize=3, label=one["model"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.set(xlabel="tokens", ylabel="needles found, %", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--seen", nargs="+", type=Path, help="results of earlier runs, in place of --models")
    parser.add_argument("--names", nargs="+", help="of the models in --seen")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--perplexity", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--windows", type=int, default=32, help="at most, of each length")
    parser.add_argument("--rope-theta", type=float)
    parser.add_argument("--layout", choices=["stacked", "unrolled"], default="stacked")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens of a row read at once")
    parser.add_argument("--batch-tokens", type=int, default=20 * 32768, help="prompt tokens of all rows of a call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.seen:
        every = [one for path in given.seen for one in json.loads(path.read_text())["models"]]
        results = pooled(every, given.names or [one["model"] for one in every])
        print(table(results))
        if given.plot is not None:
            plot(results, given.plot)
        return
    if given.text is None:
        parser.error("--text: expected a text to find needles in")
    text = given.text.read_text(encoding="utf-8")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {given.samples} samples a length", flush=True)
    results = [measure(source, text, given) for source in given.models]
    print("\n" + table(results))
    if given.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        device = jax.devices()[0].device_kind
        with replace_file(given.json) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "device": device, "models": results}, indent=1))
    if given.plot is not None:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
