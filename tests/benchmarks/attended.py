# SPDX-License-Identifier: Apache-2.0
"""How often the target accepts drafts of its own weights over a part of its own cache, by how that part is chosen.

    python -m tests.benchmarks.attended [--lengths 8192] [--prompts 24] [--out FILE]

The target answers each prompt, greedily and at temperature 1. Then both models read the answer: p is the target over
its whole cache, q the same weights whose attention to the prompt is limited, in each layer and kv head, to so many
slots, in blocks of 64:

attended   the blocks with the largest share of the attention of the target's last verification, chosen anew every
           `refresh` rounds (0: once, from the last tokens of the prompt); `memory` all: of all its queries so far
window     the first block and the last ones
retrieved  another prompt: as many tokens of the document as retrieval finds
whole      every block: what arithmetic alone costs

The first block and the last are always among the chosen, and every drafter sees the last tokens of the prompt. Within a
round of gamma drafts q reads its own keys and values of the drafts before, and the target's of all earlier ones, as a
drafter does that appends to a copy.

A JSON line a prompt and choice: `accepted` is the mean over tokens of sum(min(p, q)), at temperature 1; `agreed` how
often both have the same most probable token; `of_gamma` the share of a round's drafts that is accepted before the
first rejection, in expectation; `mass` the share of the target's attention to the prompt that lies in what was chosen.
A table of means with bootstrap intervals goes to standard error.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.config import CacheConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.request import Question
from rapid_jax.evaluate import ruler
from rapid_jax.evaluate.run import measure_of
from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.evaluate.statistics import Cell, estimate
from rapid_jax.model.decoder import Decoder
from rapid_jax.rapid import Rapid
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.prefill import Prefill, PrefillSettings
from tests.benchmarks.recall import shown

BLOCK = 64  # slots that are chosen together
ENDS = 1  # last blocks that are always chosen; what is read with the answer is seen besides
FED = 32  # last tokens of the prompt, read with the answer: their attention is what the first choice goes by
TASKS = ("niah_single_2", "niah_multikey_1", "niah_multiquery", "vt", "cwe", "fwe")


@dataclass(frozen=True)
class Choice:
    """A drafter: which slots of the prompt it reads."""

    kind: str  # attended, window, retrieved, whole
    fraction: float = 1.0  # of the prompt's slots
    refresh: int | None = None  # rounds from choice to choice; 0: one choice
    memory: str | None = None  # last: queries of the last round; all: of all rounds and of the prompt's last tokens


@dataclass(frozen=True)
class Answered:
    """An answer as the target reads it: U tokens are the prompt's last FED and the answer's but the last."""

    tokens_U: jax.Array
    size: int  # tokens of the answer; what lies behind them is padding
    log_p_TV: jax.Array  # before each token of the answer
    near: tuple[jax.Array, jax.Array]  # keys and values [L, K, U, H]
    mass_LUKM: np.ndarray  # attention of each token to each block of the prompt, summed over query heads


def attended(q_BUNH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, seen_KUS: jax.Array):
    """(attention output [1, U, N, H], softmax weights [K, U, S] summed over the query heads of a kv head)."""
    _, U, N, H = q_BUNH.shape
    q_UKGH = q_BUNH[0].reshape(U, k_KSH.shape[0], -1, H).astype(jnp.float32)
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = einsum("UKGH,KSH->KGUS", q_UKGH, k_KSH.astype(jnp.float32)) * H**-0.5
    weights = jax.nn.softmax(jnp.where(seen_KUS[:, None], scores, -jnp.inf), axis=-1)
    out = einsum("KGUS,KSH->UKGH", weights, v_KSH.astype(jnp.float32))
    return out.reshape(1, U, N, H).astype(q_BUNH.dtype), weights.sum(axis=1)


def heads_first(x_BUKH: jax.Array) -> jax.Array:
    return x_BUKH[0].swapaxes(0, 1)


@jax.jit
def read_whole(decoder: Decoder, prefix: Prefix, tokens_U: jax.Array):
    """(log-probabilities after each token from the prompt's last on, the tokens' keys and values, `mass_LUKM`)."""
    U = tokens_U.shape[0]
    pos_BU = (prefix.used + jnp.arange(U, dtype=jnp.int32))[None]
    causal_UU = jnp.tri(U, dtype=bool)
    filled_US = jnp.broadcast_to(prefix.pos_BS[0] >= 0, (U, prefix.pos_BS.shape[1]))

    def attend(q_BUNH, k_BUKH, v_BUKH, far: KV):
        own = heads_first(k_BUKH), heads_first(v_BUKH)
        keys, values = (jnp.concatenate(x, axis=1) for x in zip((far.k_BKSH[0], far.v_BKSH[0]), own, strict=True))
        seen_KUS = jnp.broadcast_to(jnp.concatenate([filled_US, causal_UU], axis=1), (keys.shape[0], U, keys.shape[1]))
        out, weights_KUS = attended(q_BUNH, keys, values, seen_KUS)
        mass_KUM = weights_KUS[..., : filled_US.shape[1]].reshape(keys.shape[0], U, -1, BLOCK).sum(axis=-1)
        return out, (own, mass_KUM.swapaxes(0, 1))

    hidden_BUD, (near, mass_LUKM) = decoder.hidden(tokens_U[None], pos_BU, attend, prefix.layers)
    return jax.nn.log_softmax(decoder.logits(hidden_BUD[:, FED - 1 :])[0]), near, mass_LUKM


@partial(jax.jit, static_argnames="gamma")
def read_chosen(decoder: Decoder, prefix: Prefix, tokens_U: jax.Array, near, chosen_LUKM: jax.Array, *, gamma: int):
    """log q after each token from the prompt's last on, in rounds of gamma, with the blocks chosen for each token."""
    U = tokens_U.shape[0]
    pos_BU = (prefix.used + jnp.arange(U, dtype=jnp.int32))[None]
    at_U = jnp.arange(U)
    begin_U1 = jnp.where(at_U < FED, at_U, FED - 1 + (at_U - FED + 1) // gamma * gamma)[:, None]  # of a token's round
    verified_UU, drafted_UU = at_U < begin_U1, (at_U >= begin_U1) & (at_U <= at_U[:, None])
    filled_S = prefix.pos_BS[0] >= 0

    def attend(q_BUNH, k_BUKH, v_BUKH, layer):
        far, (near_k_KUH, near_v_KUH), chosen_UKM = layer
        seen_KUS = jnp.repeat(chosen_UKM.swapaxes(0, 1), BLOCK, axis=-1) & filled_S
        tail_KUS = jnp.broadcast_to(jnp.concatenate([verified_UU, drafted_UU], axis=1), (len(seen_KUS), U, 2 * U))
        keys = jnp.concatenate([far.k_BKSH[0], near_k_KUH, heads_first(k_BUKH)], axis=1)
        values = jnp.concatenate([far.v_BKSH[0], near_v_KUH, heads_first(v_BUKH)], axis=1)
        return attended(q_BUNH, keys, values, jnp.concatenate([seen_KUS, tail_KUS], axis=-1))[0], None

    hidden_BUD, _ = decoder.hidden(tokens_U[None], pos_BU, attend, (prefix.layers, near, chosen_LUKM))
    return jax.nn.log_softmax(decoder.logits(hidden_BUD[:, FED - 1 :])[0])


@jax.jit
def compared(log_p_TV: jax.Array, log_q_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum(min(p, q)), whether the most probable tokens are the same), of each token."""
    accepted_T = jnp.minimum(jnp.exp(log_p_TV), jnp.exp(log_q_TV)).sum(axis=-1)
    return accepted_T, log_p_TV.argmax(axis=-1) == log_q_TV.argmax(axis=-1)


def choose(choice: Choice, mass_LUKM: np.ndarray, used: int, gamma: int) -> np.ndarray:
    """bool [L, U, K, M]: the blocks that each token's draft reads, equally many in every layer and head."""
    _, U, _, M = mass_LUKM.shape
    blocks = -(-used // BLOCK)
    count = min(max(round(blocks * choice.fraction), 1 + ENDS), blocks)
    if choice.kind == "window":
        first, last = (np.arange(M) == 0), np.arange(M) >= blocks - count + 1
        return np.broadcast_to(first | last & (np.arange(M) < blocks), mass_LUKM.shape)
    chosen_LUKM = np.zeros(mass_LUKM.shape, bool)
    step = (choice.refresh or U) * gamma
    for start in range(FED - 1, U, step):
        first = 0 if choice.memory == "all" or start == FED - 1 else start - gamma
        mass_LKM = mass_LUKM[:, first:start].sum(axis=1)
        mass_LKM[..., [0, *range(blocks - ENDS, blocks)]] = np.inf
        mass_LKM[..., blocks:] = -1
        best = np.argpartition(mass_LKM, M - count, axis=-1)[..., M - count :]
        chosen_LKM = np.zeros(mass_LKM.shape, bool)
        np.put_along_axis(chosen_LKM, best, True, axis=-1)
        chosen_LUKM[:, start : start + step] = chosen_LKM[:, None]
    return chosen_LUKM


def record(choice: Choice, answer: Answered, log_q_TV: jax.Array, gamma: int) -> dict[str, Any]:
    """What is said of a drafter on an answer."""
    accepted_T, agreed_T = (np.asarray(x, np.float64)[: answer.size] for x in compared(answer.log_p_TV, log_q_TV))
    rounds = max(answer.size // gamma, 1)  # whole ones, or all of an answer shorter than one
    of_gamma = {
        name: float(np.cumprod(rate_T[: rounds * gamma].reshape(rounds, -1), axis=1).mean(axis=1).mean())
        for name, rate_T in (("of_gamma", accepted_T), ("of_gamma_greedy", agreed_T))
    }
    means = {"accepted": float(accepted_T.mean()), "agreed": float(agreed_T.mean())}
    return vars(choice) | {"tokens": answer.size} | means | of_gamma


class Measurement:
    """The target, its retriever, and prompts about documents."""

    def __init__(self, args: argparse.Namespace, cache: str):
        self.args = args
        self.config = RapidConfig(
            models=ModelsConfig(target=args.model, layout="stacked", too_long="middle"),
            sampling=SamplingConfig(max_new_tokens=args.new_tokens),
            cache=CacheConfig(folder=cache),
        )
        self.rapid = Rapid(self.config, quiet=True)
        self.rapid.load()
        self.decoder = self.rapid.target.decoder
        if any(self.decoder.config.window_of):
            raise SystemExit("attended: expected a model whose layers all see the whole context, got one with windows")

    def prompts(self, length: int) -> Iterator[tuple[str, str, Question]]:
        """(source, id, question): RULER's tasks, then Python's language reference, `args.prompts` each."""
        samples = -(-self.args.prompts // len(TASKS))
        options = SuiteOptions(TASKS, (length,), samples=samples, seed=self.args.seed)
        made = list(ruler.samples(options, measure_of(self.config, self.rapid.target.tokenizer)))
        for sample in [one for turn in range(samples) for one in made[turn::samples]][: self.args.prompts]:
            asked = Question(sample.document, sample.question, template=sample.template, begins=sample.begins)
            yield "ruler", sample.id, asked
        encode = self.rapid.target.tokenizer.encode
        sizes = {name: len(encode(topics[name])) for name in sorted(topics)}
        long = [name for name in sizes if sizes[name] > 200]
        for name in long[:: max(len(long) // self.args.prompts, 1)][: self.args.prompts]:
            place = list(sizes).index(name)
            text, left = [], length - self.args.new_tokens - 200
            for other in [*list(sizes)[place:], *list(sizes)[:place]]:
                if sizes[other] + 2 <= left:
                    text.append(topics[other].strip())
                    left -= sizes[other] + 2
            yield "reference", f"{name}/{length}", Question("\n\n".join(text), f"What does the text say about {name}?")

    def prefix(self, tokens: Sequence[int], room: int) -> Prefix:
        """The cache of a prompt less its last FED tokens."""
        dtype = self.decoder.embed_VD[...].dtype
        work = Prefill(
            self.decoder, [tokens[:-FED]], PrefillSettings(512, room=max(room, 512), coarse=True), dtype=dtype
        )
        while work.left:
            work.step()
        return work.prefix

    def answer(self, prompt: list[int], prefix: Prefix, temperature: float, seed: int) -> list[int]:
        """The target's own."""
        made = generate(
            Prompted(self.decoder, [prompt], prefix, [len(prompt) - FED]),
            None,
            speculation=SpeculationConfig(mode="target", lookup="off", rounds_per_read=64),
            sampling=SamplingConfig(temperature=temperature, max_new_tokens=self.args.new_tokens, seed=seed),
            stops=self.rapid.target.tokenizer.stop_ids,
            token_ids=self.rapid.target.token_ids,
        )
        return made.tokens[0]

    def fed(self, prompt: list[int], answer: list[int]) -> jax.Array:
        tokens = np.zeros(FED + self.args.new_tokens - 1, np.int32)
        tokens[: FED + len(answer) - 1] = [*prompt[-FED:], *answer[:-1]]
        return jnp.asarray(tokens)

    def of_prompt(self, asked: Question, seed: int, length: int) -> Iterator[dict[str, Any]]:
        """The records of a prompt."""
        plain = replace(self.config, speculation=SpeculationConfig(mode="target"))
        prompt = self.rapid.read(asked, settings=plain).long.tokens
        prefix, used = self.prefix(prompt, length), len(prompt) - FED
        retrieved = {fraction: self.retrieved(asked, int(used * fraction)) for fraction in self.args.fractions}
        for temperature in (0.0, 1.0):
            answer = self.answer(prompt, prefix, temperature, seed)
            tokens_U = self.fed(prompt, answer)
            log_p_TV, near, mass_LUKM = read_whole(self.decoder, prefix, tokens_U)
            known = Answered(tokens_U, len(answer), log_p_TV, near, np.asarray(mass_LUKM))
            for choice in self.choices():
                more = {}
                if choice.kind == "retrieved":
                    short, short_prefix = retrieved[choice.fraction]
                    log_q_TV, *_ = read_whole(self.decoder, short_prefix, self.fed(short, answer))
                    more["budget"] = len(short) - FED
                else:
                    chosen_LUKM = choose(choice, known.mass_LUKM, used, self.args.gamma)
                    given = self.decoder, prefix, tokens_U, near, jnp.asarray(chosen_LUKM)
                    log_q_TV = read_chosen(*given, gamma=self.args.gamma)
                    answered = slice(FED - 1, FED - 1 + len(answer))
                    inside_LUK = (known.mass_LUKM * chosen_LUKM)[:, answered].sum(axis=-1)
                    more["mass"] = float((inside_LUK / known.mass_LUKM[:, answered].sum(axis=-1)).mean())
                    more["budget"] = int(chosen_LUKM[0, -1, 0].sum()) * BLOCK
                yield {"temperature": temperature, **record(choice, known, log_q_TV, self.args.gamma), **more}

    def retrieved(self, asked: Question, budget: int) -> tuple[list[int], Prefix]:
        """(the drafter's prompt with so many tokens of chunks, its cache)."""
        chunk = max(min(256, budget // 2), 16)
        retrieval = RetrievalConfig(chunk_tokens=chunk, min_tokens=budget, compression=10**6)
        settings = replace(self.config, retrieval=retrieval, speculation=SpeculationConfig(mode="lossless"))
        short = self.rapid.read(asked, settings=settings).short
        assert short is not None
        return short.tokens, self.prefix(short.tokens, budget + chunk)

    def choices(self) -> Iterator[Choice]:
        """What is compared."""
        yield Choice("whole")
        for fraction in self.args.fractions:
            yield Choice("retrieved", fraction)
            yield Choice("window", fraction)
            yield from (Choice("attended", fraction, refresh, "last") for refresh in self.args.refresh)
            yield Choice("attended", fraction, self.args.refresh[0], "all")


def summary(records: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of a table: by length, source, temperature and choice."""
    yield "| length | prompts | T | drafter | slots | refresh | memory | accepted | of gamma | agreed | mass |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    names = ("length", "source", "temperature", "kind", "fraction", "refresh", "memory")
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in records:
        cells.setdefault(tuple(one[name] for name in names), []).append(one)
    for (length, source, temperature, kind, fraction, refresh, memory), found in cells.items():
        of_gamma = "of_gamma" if temperature else "of_gamma_greedy"
        columns = [shown(estimate([Cell(1.0, [(one["prompt"], one[name]) for one in found])])) for name in
                   ("accepted", of_gamma, "agreed")]  # fmt: skip
        mass = "" if "mass" not in found[0] else f"{100 * np.mean([one['mass'] for one in found]):.1f}"
        slots = f"{fraction:g} = {np.mean([one['budget'] for one in found]):,.0f}"
        how = f"{'' if refresh is None else refresh} | {memory or ''}"
        yield (
            f"| {length} | {source}, {len(found)} | {temperature:g} | {kind} | {slots} | {how} | "
            f"{' | '.join(columns)} | {mass} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], help="tokens of prompt and answer")
    parser.add_argument("--prompts", type=int, default=24, help="of RULER and of the language reference, each")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1 / 16, 1 / 8, 1 / 4, 1 / 2])
    parser.add_argument("--refresh", type=int, nargs="+", default=[1, 4, 16, 0])
    parser.add_argument("--gamma", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as cache, args.out.open("w") if args.out else sys.stdout as out:
        measurement = Measurement(args, cache)
        for length in args.lengths:
            for seed, (source, prompt, asked) in enumerate(measurement.prompts(length)):
                for found in measurement.of_prompt(asked, args.seed + seed, length):
                    records.append({"length": length, "source": source, "prompt": prompt, **found})
                    print(json.dumps(records[-1]), file=out, flush=True)
                print(f"{prompt}: done", file=sys.stderr, flush=True)
    print("\n".join(summary(records)), file=sys.stderr)


if __name__ == "__main__":
    main()
