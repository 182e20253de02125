# SPDX-License-Identifier: Apache-2.0
"""Plain decoding and RAPID side by side, by the same `generate` that answers questions, at temperature 0.

A ratio is printed only where the tokens are the baseline's. Sums in another order can turn a tie of the two best logits
around, and all that follows is then another text: the first token that differs must be such a tie. What passes for
one is measured: how far the same text's logits move when it is read in pieces of another width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.attention.attended import BLOCK as BLOCK_OF_CHOICE
from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.bench.cases import FIRST_DIAL, Case, Measured, Timing, plain_bytes
from rapid_jax.bench.models import random_decoder, random_prefix, scale_attention_outputs
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.quantized import BITS
from rapid_jax.runtime.mesh import make_meshes, replicate
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.draft import read
from rapid_jax.speculative.extend import extend
from rapid_jax.speculative.generate import Generation, Prompted, generate
from rapid_jax.speculative.prefill import new_tail
from rapid_jax.speculative.round_times import RoundTimes
from rapid_jax.speculative.state import Plan, Side

BLOCK = 16384  # slots that plain XLA attends at once
WIDTHS = (16, 8)  # tokens of the pieces by which a text is read, to see how far the order of sums moves its logits
TIES = 5.0  # gaps up to so many standard deviations of that are ties,
LARGEST_TIE = 0.15  # but none above this share of the logits' own deviation
CALIBRATED = 0.02  # how near the measured acceptance has to come to the one asked for


@dataclass
class Decoding:
    """A target with random weights and prompts of random keys and values; drafters are its copies, over short ones.

    With `small` they are copies of another model, with weights of its own and the target's vocabulary and tying: both
    then vote for the same token, and the dial scales the attention of both.
    """

    config: ModelConfig
    dtype: jnp.dtype
    short: int  # tokens of the drafter's prompt
    tokens: int  # to decode, a row
    timings: int = 3  # of each case
    memory_rate: float | None = None  # bytes a second of a device, for floors
    over: MeshConfig | None = None  # the devices; None: one
    seed: int = 0
    dial: float = 0.0
    small: ModelConfig | None = None
    first_dial: float = FIRST_DIAL  # that `calibrate` tries first
    tell: Callable[[str], None] = print
    _held: dict[Any, Any] = field(default_factory=dict)  # one of each kind: models and prompts are large
    _times: dict[Case, RoundTimes] = field(default_factory=dict)  # what its decoding has learnt of rounds
    _plain: dict[Case, tuple[float, list[list[int]]]] = field(default_factory=dict)  # its ms a token, its tokens

    def measure(self, case: Case) -> Measured:
        """Decodes once to compile, then `timings` times; tokens and rounds are those of the median one.

        A gamma of auto knows from the first time how long its rounds take, as in a server that has answered before.
        """
        baseline = None if case == case.baseline else self._baseline(case)
        compile_seconds = self._decode(case).compile_seconds
        runs = sorted((self._decode(case) for _ in range(self.timings)), key=lambda run: run.decode_seconds)
        middle = runs[(len(runs) - 1) // 2]
        made = sum(map(len, middle.tokens))
        ms = Timing.of([run.decode_seconds for run in runs], 1e3 * case.batch / made)
        same, ratio = "", None
        if baseline is None:
            self._plain[case] = (ms.median, middle.tokens)
        else:
            same = self._worst(case, baseline[1], [run.tokens for run in runs])
            exact = case.kv == "full"
            ratio = baseline[0] / ms.median if same in ("yes", "until a tie") or not exact else None
        rate, read = self.memory_rate, plain_bytes(self.config, case, self.dtype.itemsize, self.over)
        return Measured(
            case=case,
            dial=self.dial,
            ms_per_token=ms.median,
            ms_least=ms.least,
            ms_most=ms.most,
            timings=len(runs),
            tokens_per_second=1e3 * case.batch / ms.median,
            acceptance=_acceptance(middle),
            tokens_per_round=made / max(sum(middle.rounds), 1),
            rounds=middle.target_steps,
            draft_steps=middle.draft_steps,
            compile_seconds=compile_seconds,
            floor_ms=None if rate is None else 1e3 * read / rate,
            same=same,
            baseline_ms=None if baseline is None else baseline[0],
            ratio=ratio,
        )

    def knows_baseline(self, case: Case) -> bool:
        """Whether plain decoding was measured as the models are now; if not, `measure` does that first."""
        return case.baseline in self._plain

    def calibrate(self, case: Case, acceptance: float) -> float:
        """Turns the dial until the case's drafts are accepted at about this rate; the rate that was reached.

        What was measured before is forgotten: with the dial plain decoding says something else.
        """
        self._plain.clear()
        low, high, found = 0.0, None, {}
        self.dial = self.dial or self.first_dial
        for _ in range(9):
            found[self.dial] = reached = self._acceptance(case)
            self.tell(f"dial {self.dial:.4g}: {reached:.3f} of the drafts accepted")
            if abs(reached - acceptance) <= CALIBRATED:
                break
            low, high = (self.dial, high) if reached > acceptance else (low, self.dial)
            self.dial = 2 * low if high is None else (low + high) / 2
        self.dial = min(found, key=lambda dial: abs(found[dial] - acceptance))
        return found[self.dial]

    def release(self) -> None:
        """Frees prompts and quantised copies."""
        for key in [key for key in self._held if not key.endswith("weights")]:
            del self._held[key]
        self._plain.clear()

    @cached_property
    def _mesh(self) -> Mesh | None:
        return None if self.over is None else make_meshes(self.over, None)[0]

    def _acceptance(self, case: Case) -> float:
        return _acceptance(self._decode(case)) or 0.0

    def _baseline(self, case: Case) -> tuple[float, list[list[int]]]:
        if case.baseline not in self._plain:
            self.measure(case.baseline)
        return self._plain[case.baseline]

    def _decode(self, case: Case) -> Generation:
        target = self._target(case)
        drafter = None if case.drafter == "none" else self._drafter(case)
        speculation = SpeculationConfig(
            mode="target" if drafter is None else "lossless",
            gamma=case.gamma,
            lookup="off" if case.quoting is None else "auto",
            rounds_per_read=8,
            attended_tokens=max(self.short, 2 * BLOCK_OF_CHOICE),
        )
        return generate(
            target,
            drafter,
            speculation=speculation,
            sampling=SamplingConfig(temperature=0, max_new_tokens=self.tokens),
            stops=(),
            texts=self._texts(case),
            block=BLOCK,
            times=self._times.setdefault(case, RoundTimes()),
        )

    def _texts(self, case: Case) -> list[list[int]]:
        """What may be copied: every id in order, as the model mostly writes them, or as many random ones."""
        if case.quoting is None:
            return []
        ids = np.arange(self.config.vocab_size)
        if not case.quoting:
            ids = np.random.default_rng(self.seed).integers(0, len(ids), len(ids))
        return [ids.tolist()] * case.batch

    def _prompts(self, case: Case) -> list[list[int]]:
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, self.config.vocab_size, (case.batch, case.context + 1)).tolist()

    def _hold(self, name: str, what: Any, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave the last time for the same `what`; one at a time is kept under a name."""
        if name not in self._held or self._held[name][0] != what:
            self._held.pop(name, None)
            self._held[name] = (what, make())
        return self._held[name][1]

    def _base(self, config: ModelConfig) -> Decoder:
        return fuse(random_decoder(config, self.dtype, self.seed, self._mesh), spent=True)

    def _decoder(self) -> Decoder:
        base = self._hold("weights", None, lambda: self._base(self.config))
        return self._hold("scale_attention_outputs", self.dial, lambda: scale_attention_outputs(base, self.dial))

    def _drafting(self) -> Decoder:
        """What drafts, in full."""
        if (small := self.small) is None:
            return self._decoder()
        base = self._hold("small weights", None, lambda: self._base(small))
        return self._hold("small dialled", self.dial, lambda: scale_attention_outputs(base, self.dial))

    def _prefix(self, name: str, case: Case, tokens: int, seed: int) -> Prefix:
        is_quantized = case.kv == "int8" if name == "long" else case.drafter != "full"
        batch = case.prefixes if name == "long" else case.batch

        def make() -> Prefix:
            how: Any = {"dtype": self.dtype, "seed": seed, "mesh": self._mesh}
            config = self.config if name == "long" else self.small or self.config
            made = random_prefix(config, batch=batch, tokens=tokens, **how)
            return quantize_kv(made) if is_quantized else made

        return self._hold(name, (batch, tokens, is_quantized), make)

    def _target(self, case: Case) -> Prompted:
        prefix = self._prefix("long", case, case.context, self.seed + 1)
        return Prompted(self._decoder(), self._prompts(case), prefix, [case.context] * case.batch)

    def _drafter(self, case: Case) -> Prompted | Decoder:
        if case.attends:
            return self._weights(case.weights)
        short = min(self.short, case.context)
        prefix = self._prefix("short", case, short, self.seed + 2)
        prompts = [prompt[-short - 2 :] for prompt in self._prompts(case)]
        return Prompted(self._weights(case.weights), prompts, prefix, [len(prompts[0]) - 2] * case.batch)

    def _weights(self, kind: str) -> Decoder:
        decoder = self._drafting()
        if kind == "full":
            return decoder
        return self._hold("copy", (kind, self.dial), lambda: quantize(decoder, BITS[kind]))

    def _worst(self, case: Case, wanted: list[list[int]], found: list[list[list[int]]]) -> str:
        """What `_compared` says of the run that is least like plain decoding."""
        said = [self._compared(case, wanted, got) for at, got in enumerate(found) if got not in found[:at]]
        return max(said, key=lambda word: (word != "yes", word != "until a tie", word.startswith("no")))

    def _compared(self, case: Case, wanted: list[list[int]], got: list[list[int]]) -> str:
        for row, (one, other) in enumerate(zip(wanted, got, strict=True)):
            at = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
            if at is None:
                continue
            if case.kv != "full":
                return f"{at} of {len(one)}, quantised keys and values"
            gap, tie = self._gap(case, row, one[:at], one[at], other[at])
            if gap > tie:
                return f"no: token {at} of row {row} differs, by {gap:.3f} of the logits' deviation, a tie is {tie:.3f}"
            return "until a tie"
        return "yes"

    def _gap(self, case: Case, row: int, before: list[int], first: int, second: int) -> tuple[float, float]:
        """(how far the target's logits of two tokens are apart after the prompt and `before`, what passes for a tie).

        Both in standard deviations of the logits.
        """
        z_V, again_V = (self._logits(case, row, before, width) for width in WIDTHS)
        moved = TIES * float((z_V - again_V).std() / z_V.std())
        return float((z_V[first] - z_V[second]) / z_V.std()), min(max(moved, 1e-5), LARGEST_TIE)

    def _logits(self, case: Case, row: int, before: list[int], width: int) -> np.ndarray:
        """float64 [V]: the target's after a row's prompt and `before`, read by `width` tokens at once."""
        target = self._target(case)
        decoder, prefix = target.decoder, target.prefix
        fed = [target.prompts[row][-1], *before]
        last = (len(fed) - 1) // width * width
        tail = new_tail(decoder, [case.context] * case.batch, self.tokens + max(WIDTHS), self.dtype)
        tail = extend(decoder, prefix, tail, [fed[:last]] * case.batch, width=width, block_size=BLOCK)
        none_B = np.zeros(case.batch, np.int32)
        side = Side(decoder, prefix, *replicate(decoder.mesh, (none_B[:, None], none_B)))
        piece_BT = np.zeros((case.batch, width), np.int32)
        piece_BT[:, : len(fed) - last] = fed[last:]
        plan = Plan(0, 0, 1, BLOCK, self.config.vocab_size)
        logits_BTV, _ = _read(side, tail, replicate(decoder.mesh, piece_BT), plan=plan, rows=width)
        return np.asarray(logits_BTV[row, len(fed) - 1 - last], np.float64)


_read = jax.jit(read, static_argnames=("plan", "rows"))


def _acceptance(generation: Generation) -> float | None:
    """Of the drafts that were looked at, how many were accepted; None where there were none."""
    accepted = sum(generation.accepted)
    looked = accepted + sum(generation.rejected)
    return accepted / looked if looked else None
