# SPDX-License-Identifier: Apache-2.0
"""From two prefilled prompts to tokens: the host's part of speculation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import jax
import numpy as np

from rapid_jax.attention.cache import Prefix, Tail
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.compiling import forget_programs, timed
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import replicate
from rapid_jax.speculative.attended import Choices, attended_side
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.extend import extend
from rapid_jax.speculative.initial_state import EXTEND_WIDTH, RECENT, Room, Sizes, plan_of, start_state, text_slots
from rapid_jax.speculative.pace import Pace
from rapid_jax.speculative.prefill import new_tail
from rapid_jax.speculative.round_times import RoundTimes
from rapid_jax.speculative.rounds import Rounds
from rapid_jax.speculative.sampling import SamplingParams, SamplingRule
from rapid_jax.speculative.state import Side, State


@dataclass(frozen=True)
class Prompted:
    """A model and one prompt a row, of which the prefix holds the first tokens."""

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    prefix: Prefix
    cached: Sequence[int]  # tokens of each prompt that the prefix holds; at most all but the last (drafter: last two)


@dataclass(frozen=True)
class Generation:
    """What was generated; lists have one item a row."""

    tokens: list[list[int]]
    origins: list[list[int]]
    finish_reasons: list[str]  # stop: a stop token; length: the limit; interrupted: the caller said so
    drafted: list[int]
    accepted: list[int]
    rejected: list[int]  # rounds that ended before the last draft
    rounds: list[int]
    copied: list[int]
    copied_accepted: list[int]
    draft_steps: int
    target_steps: int
    gammas: dict[int, int]  # rounds run with each gamma
    prepare_seconds: float  # prompt tokens after the prefixes
    compile_seconds: float  # compiling what was not compiled yet, for either
    decode_seconds: float  # the rounds

    def row(self, row: int) -> "Generation":
        """Of one row alone; steps, gammas and seconds stay those of all rows together."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: [value[row]] for name, value in own.items() if isinstance(value, list)})


def _side(prompted: Prompted, *, uncached: int, sizes: Sizes, block: int) -> tuple[Side, Tail]:
    """The model ready for rounds: every prompt token but the last `uncached` is in its prefix or its tail."""
    suffixes = []
    for prompt, cached in zip(prompted.prompts, prompted.cached, strict=True):
        if len(prompt) - uncached < cached:
            raise InputError(f"expected at most {len(prompt) - uncached} cached prompt tokens, got {cached}")
        suffixes.append(prompt[cached : len(prompt) - uncached])
    longest = max(len(suffix) for suffix in suffixes)
    dtype = prompted.decoder.embed_VD[...].dtype  # of what is read anew, whatever the prefix is stored in
    tail = new_tail(prompted.decoder, list(prompted.cached), sizes.tail(longest), dtype)
    if longest:
        tail = extend(prompted.decoder, prompted.prefix, tail, suffixes, width=EXTEND_WIDTH, block_size=block)
    recent = np.full((len(suffixes), RECENT), -1, np.int32)
    for row, prompt in enumerate(prompted.prompts):
        last = list(prompt[-RECENT:])
        recent[row, RECENT - len(last) :] = last
    lengths = np.asarray([len(prompt) for prompt in prompted.prompts], np.int32)
    return Side(prompted.decoder, prompted.prefix, *replicate(prompted.decoder.mesh, (recent, lengths))), tail


def _text(texts: Sequence[Sequence[int]], match: int, room: int) -> np.ndarray:
    longest = max(room, *(len(text) for text in texts))
    text_BM = np.full((len(texts), text_slots(longest, match)), -1, np.int32)
    for row, text in enumerate(texts):
        text_BM[row, : len(text)] = text
    return text_BM


def _seen(prompted: Prompted | None, vocabulary: int, sampling: SamplingConfig) -> np.ndarray | None:
    if prompted is None or sampling.repetition_penalty == 1:
        return None
    seen_BV = np.zeros((len(prompted.prompts), vocabulary), bool)
    if sampling.penalize == "all":
        for row, prompt in enumerate(prompted.prompts):
            seen_BV[row, [token for token in prompt if token < vocabulary]] = True
    return seen_BV


def allowed_rows(token_ids: Sequence[int] | np.ndarray, vocabulary: int) -> np.ndarray | None:
    """bool [V]: which of a model's rows are tokens; None where all are."""
    allowed_V = np.zeros(vocabulary, bool)
    ids = np.asarray(token_ids)
    allowed_V[ids[ids < vocabulary]] = True
    return None if allowed_V.all() else allowed_V


def generation_of(rounds: Rounds, gammas: dict[int, int], seconds: dict[str, float]) -> Generation:
    """Everything emitted, and how. `gammas`: rounds run with each; `seconds`: prepare, compile, decode."""
    host, counts = rounds.host, rounds.host.counts
    lengths = host.count_B.tolist()
    tokens = [row[:length].tolist() for row, length in zip(host.emitted_BO, lengths, strict=True)]
    reasons = [
        "stop" if row and row[-1] in rounds.rule.stops else "interrupted" if cut else "length"
        for row, cut in zip(tokens, rounds.interrupted, strict=True)
    ]
    return Generation(
        tokens=tokens,
        origins=[row[:length].tolist() for row, length in zip(host.origin_BO, lengths, strict=True)],
        finish_reasons=reasons,
        drafted=counts.drafted_B.tolist(),
        accepted=counts.accepted_B.tolist(),
        rejected=counts.rejected_B.tolist(),
        rounds=counts.round_B.tolist(),
        copied=counts.copied_B.tolist(),
        copied_accepted=counts.copied_accepted_B.tolist(),
        draft_steps=int(np.max(counts.draft_steps_B)),
        target_steps=int(np.max(counts.round_B)),
        gammas=gammas,
        prepare_seconds=seconds["prepare"],
        compile_seconds=seconds["compile"],
        decode_seconds=seconds["decode"],
    )


def start(
    target: Prompted,
    drafter: Prompted | Decoder | None,
    *,
    speculation: SpeculationConfig,
    sampling: SamplingConfig,
    stops: Sequence[int],
    texts: Sequence[Sequence[int]] = (),
    seeds: Sequence[int] | None = None,
    block: int = 8192,
    token_ids: Sequence[int] | np.ndarray | None = None,
    room: Room | None = None,
) -> Rounds:
    """Rows that have read all of their prompts, before their first tokens.

    `texts` is what prompt lookup may copy from, as token ids: document, then retrieved text. Answers are made of
    `token_ids`, those that the tokenizer has (default: those that both models have), whatever rows the models were
    padded to; a drafter may lack some of them. `room` is what arrays hold beside what is needed. A drafter
    without a prompt, the target's weights or a copy of them, reads what the target attends to (`attended.py`).
    """
    batch, room = len(target.prompts), room or Room()
    sizes = Sizes.of(speculation, sampling, room)
    vocabulary = target.decoder.vocabulary
    if token_ids is None:
        decoders = [target.decoder, *([drafter.decoder] if isinstance(drafter, Prompted) else [])]
        token_ids = range(min(decoder.config.vocab_size for decoder in decoders))
    target_side, target_tail = _side(target, uncached=1, sizes=sizes, block=block)
    drafter_side, draft_tail = None, None
    plan, queries, choices = plan_of(speculation, block=block, vocabulary=vocabulary), None, None
    if isinstance(drafter, Decoder):
        drafter_side, queries = attended_side(target_side, target_tail, drafter, speculation.attended_tokens, plan)
        drafter, choices = target, Choices(speculation.attended_rounds, batch)
    elif drafter is not None:
        drafter_side, draft_tail = _side(drafter, uncached=2, sizes=sizes, block=block)
    seen = _seen(target, vocabulary, sampling), _seen(drafter, vocabulary, sampling)
    seeds = seeds or [sampling.seed] * batch
    host_state = start_state(seeds, sizes, sampling.max_new_tokens, seen, logprobs=room.logprobs)
    placed_state = replicate(target.decoder.mesh, host_state)
    state = State(target_tail=target_tail, draft_tail=draft_tail, **placed_state, queries_BGLNH=queries)
    text_BM = _text(texts or [[]] * batch, speculation.lookup_match, room.text)
    rule = SamplingRule.of(sampling, speculation, stops, logprobs=room.logprobs)
    params = SamplingParams.of(sampling, speculation, allowed_rows(token_ids, vocabulary))
    sides = target_side, drafter_side
    rounds = Rounds(sides, text_BM, state, rule, params, plan, choices)
    jax.block_until_ready((target_tail, draft_tail))
    return rounds


# (row, new tokens, their origins) -> whether the row should stop
OnTokens: TypeAlias = Callable[[int, list[int], list[int]], bool]


def generate(
    target: Prompted,
    drafter: Prompted | Decoder | None,
    *,
    speculation: SpeculationConfig,
    on_tokens: OnTokens | None = None,
    times: RoundTimes | None = None,
    **how: Any,
) -> Generation:
    """Tokens for every row until a stop token, the length limit or the caller's word; `how` is what `start` is told.

    With a fixed gamma, row b's tokens depend on its own prompts and `seeds[b]` (default: the seed of the settings for
    every row), not on the rest of the batch. gamma = auto goes by the clock: the tokens need not be the same again
    except at temperature 0 where they are the target's, and its rounds without drafts sample from the target's own
    distribution whatever eta is. It starts from what is known of `times`, of calls with the same models.

    Raises InputError where a model gives logits that are not numbers.
    """
    with timed() as prepared:
        rounds = start(target, drafter, speculation=speculation, **how)
    clock = time.perf_counter()
    pace = Pace(speculation, rounds.sides[1] is not None, times or RoundTimes()).under(speculation, rounds)
    told = [0] * len(target.prompts)

    def tell() -> None:
        for row, count in enumerate(rounds.host.count_B.tolist()):
            if on_tokens is None or rounds.interrupted[row] or count == told[row]:
                continue
            span, told[row] = slice(told[row], count), count
            emitted, origin = rounds.host.emitted_BO[row, span].tolist(), rounds.host.origin_BO[row, span].tolist()
            if on_tokens(row, emitted, origin):
                rounds.interrupt(row)

    while not all(rounds.ended()):
        pace.advance(rounds, tell)
    seconds = time.perf_counter() - clock - rounds.compile_seconds
    compiling = prepared.compiling + rounds.compile_seconds
    taken = {"prepare": prepared.working, "compile": compiling, "decode": seconds}
    generation = generation_of(rounds, pace.gammas, taken)
    forget_programs()
    return generation
