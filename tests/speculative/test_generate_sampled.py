# SPDX-License-Identifier: Apache-2.0
"""Temperature above 0: what the tokens depend on, what is counted, and how an answer ends."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative import extend as extend_module
from rapid_jax.speculative import prefill as prefill_module
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Generation, generate
from rapid_jax.speculative.loop import run_rounds
from rapid_jax.speculative.state import Origin
from tests.compiled import compiled
from tests.speculative.conftest import LIMIT, VOCABULARY
from tests.speculative.models import prompted

WARM = SamplingConfig(temperature=0.8, max_new_tokens=LIMIT, seed=5)
DRAFTED = SpeculationConfig(eta=3.0, gamma=3, lookup="off")
COPIED = SpeculationConfig(eta=3.0, gamma=3, lookup="on")


def test_same_seed_same_tokens_and_another_seed_others(answer):
    first, again = answer(DRAFTED, WARM), answer(DRAFTED, WARM)
    assert first.tokens == again.tokens and first.origins == again.origins
    other = answer(DRAFTED, WARM, seeds=[6, 7, 8])
    assert all(a != b for a, b in zip(first.tokens, other.tokens, strict=True))
    assert all(len(set(row)) > 3 for row in first.tokens if len(row) > 8)
    assert 0 < sum(first.accepted) < sum(first.drafted)


@pytest.mark.parametrize("confidence_stop", [0.0, 0.5])
def test_copying_changes_no_token(answer, confidence_stop):
    """The drafter draws each draft from the number of its position, whether or not the token was copied first.

    Drafts end at the same places too: after a stop token, and after an unsure one.
    """
    plain = answer(replace(DRAFTED, confidence_stop=confidence_stop), WARM)
    texts = plain.tokens  # copies of the answer itself: most are right
    copied = answer(replace(COPIED, confidence_stop=confidence_stop), WARM, texts=texts)
    assert copied.tokens == plain.tokens
    assert copied.drafted == plain.drafted and copied.accepted == plain.accepted
    assert sum(copied.copied_accepted) > 5 and copied.draft_steps < plain.draft_steps
    assert any(Origin.LOOKUP in row for row in copied.origins)


def test_a_row_does_not_depend_on_the_other_rows(answer):
    seeds = [11, 12, 13]
    together = answer(DRAFTED, WARM, seeds=seeds)
    for row, seed in enumerate(seeds):
        alone = answer(DRAFTED, WARM, rows=[row], seeds=[seed])
        assert alone.tokens == [together.tokens[row]] and alone.origins == [together.origins[row]]
        assert alone.rounds == [together.rounds[row]] and alone.accepted == [together.accepted[row]]


def test_eta_zero_is_lossless_speculation_bit_for_bit(answer):
    rapid = answer(SpeculationConfig(mode="rapid", eta=0.0, gamma=3, lookup="off"), WARM)
    lossless = answer(SpeculationConfig(mode="lossless", eta=7.0, gamma=3, lookup="off"), WARM)
    assert rapid.tokens == lossless.tokens and rapid.accepted == lossless.accepted
    assert answer(DRAFTED, WARM).tokens != lossless.tokens


@pytest.mark.parametrize("eta", [0.0, 10.0, 50.0])
def test_a_drafter_equal_to_the_target_is_never_refused(questions, answer, eta):
    """p = q in exact arithmetic, so p_hat = q and the ratio is 1.

    The two are computed by passes of different width and differ by about 1e-6, which eta multiplies: a refusal has a
    chance of some 1e-5 a token, and these seeds meet none.
    """
    got = answer(
        SpeculationConfig(eta=eta, gamma=3, lookup="off"),
        WARM,
        drafter=questions.target,
        draft_prompts=questions.prompts,
    )
    assert got.accepted == got.drafted and sum(got.drafted) > 20


def check_counts(got: Generation, stops: set[int], limit: int) -> None:
    """Every token was an accepted draft or the one token that its round adds."""
    for row, (tokens, origins) in enumerate(zip(got.tokens, got.origins, strict=True)):
        drafts = sum(origin in (Origin.DRAFT, Origin.LOOKUP) for origin in origins)
        added = sum(origin in (Origin.CORRECTION, Origin.BONUS) for origin in origins)
        assert len(tokens) == len(origins) == drafts + added <= limit
        assert drafts == got.accepted[row] <= got.drafted[row]
        cut = origins[-1] in (Origin.DRAFT, Origin.LOOKUP)  # a stop token or the limit left no room for it
        assert got.rounds[row] == added + cut
        assert not set(tokens[:-1]) & stops
        ended = tokens[-1] in stops
        assert got.finish_reasons[row] == ("stop" if ended else "length") and (ended or len(tokens) == limit)
    assert max(got.rounds) <= got.target_steps == sum(got.gammas.values())
    assert sum(got.copied_accepted) <= sum(got.copied)


def test_counts_agree_with_the_tokens(questions, answer):
    for speculation in (DRAFTED, COPIED, SpeculationConfig(mode="lossless", gamma=0, lookup="on")):
        for seed in range(3):
            got = answer(speculation, WARM, seeds=[seed, seed + 10, seed + 20], texts=questions.greedy)
            check_counts(got, {questions.stop}, LIMIT)
            assert got.draft_steps <= (speculation.gamma or 0) * got.target_steps


def test_limits_of_every_remainder(questions, answer):
    for limit in (20, 21, 22, 23):
        sampling = SamplingConfig(temperature=0.8, max_new_tokens=limit, seed=5)
        got = answer(DRAFTED, sampling)
        check_counts(got, {questions.stop}, limit)
        whole = answer(DRAFTED, WARM)
        assert got.tokens == [row[:limit] for row in whole.tokens]  # a limit changes nothing before it


def test_tokens_arrive_as_they_are_made_and_a_row_may_be_interrupted(answer):
    whole = answer(DRAFTED, WARM)
    heard: list[list[int]] = [[], [], []]
    origins: list[list[int]] = [[], [], []]

    def listen(row: int, tokens: list[int], origin: list[int]) -> bool:
        assert tokens and len(tokens) == len(origin)
        heard[row] += tokens
        origins[row] += origin
        return row == 1

    got = answer(replace(DRAFTED, rounds_per_read=1), WARM, on_tokens=listen)
    assert heard[0] == whole.tokens[0] and heard[2] == whole.tokens[2]
    assert origins[0] == whole.origins[0]
    assert got.finish_reasons == [whole.finish_reasons[0], "interrupted", whole.finish_reasons[2]]
    assert 1 <= len(heard[1]) < len(whole.tokens[1])
    assert got.tokens[1] == heard[1] == whole.tokens[1][: len(heard[1])]


def test_confidence_stop_shortens_drafts(questions, answer):
    """An unsure token ends the draft, is in it, and may be accepted."""
    full, sure = answer(DRAFTED, WARM), answer(replace(DRAFTED, confidence_stop=0.5), WARM)
    assert sum(sure.drafted) / sum(sure.rounds) < sum(full.drafted) / sum(full.rounds)
    assert min(d / r for d, r in zip(sure.drafted, sure.rounds, strict=True)) >= 1
    check_counts(sure, {questions.stop}, LIMIT)


def test_a_second_question_compiles_nothing(questions, answer):
    """Another text of the same bucket, eta, temperature, seed: all are data of the same programs."""

    answer(DRAFTED, WARM)
    functions: list[Any] = [
        run_rounds,
        prefill_module._chunk_layer,
        extend_module._tail_layer,
        prefill_module.embed_chunk,
    ]
    before = [function._cache_size() for function in functions]
    with compiled() as programs:
        other = [[*prompt[3:], 1] for prompt in questions.prompts]
        generate(
            prompted(questions.target, other),
            prompted(questions.drafter, [[*prompt, 3, 1] for prompt in questions.draft_prompts]),
            speculation=SpeculationConfig(eta=20.0, gamma=3, lookup="off", alpha=0.3),
            sampling=SamplingConfig(temperature=1.3, max_new_tokens=LIMIT - 1, seed=99),
            stops=(questions.stop,),
            texts=[[1, 2, 3]] * 3,
        )
        assert [function._cache_size() for function in functions] == before
        assert not programs
        jax.jit(lambda x: x * 3 + 1)(np.ones(3))
        assert len(programs) == 1  # the count counts


def test_what_does_not_fit_is_refused(questions):
    target = prompted(questions.target, questions.prompts)
    greedy = SamplingConfig(temperature=0, max_new_tokens=LIMIT)
    whole = prompted(questions.drafter, questions.draft_prompts, keep=1)  # the drafter re-reads its last two
    with pytest.raises(InputError, match="at most 17 cached prompt tokens, got 18"):
        generate(target, whole, speculation=DRAFTED, sampling=greedy, stops=())


def test_without_a_drafter_the_target_answers_alone(questions):
    """Also the distribution of mode target: the same numbers, position by position, as plain sampling of p."""
    got = generate(
        prompted(questions.target, questions.prompts),
        None,
        speculation=SpeculationConfig(mode="target", gamma=5, lookup="off"),
        sampling=WARM,
        stops=(questions.stop,),
    )
    assert got.gammas.keys() == {0} and got.draft_steps == 0 and got.drafted == [0, 0, 0]
    assert all(set(row) == {Origin.BONUS} for row in got.origins)
    assert max(max(row) for row in got.tokens) < VOCABULARY
    copied = generate(
        prompted(questions.target, questions.prompts),
        None,
        speculation=SpeculationConfig(mode="target", lookup="on"),
        sampling=WARM,
        stops=(questions.stop,),
        texts=got.tokens,
    )
    assert copied.tokens == got.tokens
    assert sum(copied.accepted) > 5 and np.sum(copied.rounds) < np.sum(got.rounds)
