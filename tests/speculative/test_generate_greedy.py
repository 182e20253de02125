# SPDX-License-Identifier: Apache-2.0
"""Temperature 0 without transfer: every way of speculating gives the target's own greedy answer, token for token."""

import importlib
import time

import jax
import numpy as np
import pytest

from rapid_jax.speculative.config import Mode, SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import generate
from rapid_jax.speculative.rounds import Rounds
from rapid_jax.speculative.schedule import AutoGamma, Observation
from rapid_jax.speculative.state import Origin, Plan
from tests.reference import greedy
from tests.speculative.conftest import LIMIT, VOCABULARY
from tests.speculative.models import Weights, next_logits, prompted

GREEDY = SamplingConfig(temperature=0, max_new_tokens=LIMIT)
# The word "generate" in the package is the module; the function in it hides it from a plain import.
pace_module = importlib.import_module("rapid_jax.speculative.pace")


@pytest.mark.parametrize("lookup", ["off", "on"])
@pytest.mark.parametrize("gamma", [0, 3])
def test_every_mode_is_greedy_decoding_of_the_target(questions, answer, gamma, lookup):
    """Rows of different prompts, which end at different times."""
    assert len({len(row) for row in questions.until_stop()}) == 3
    modes: list[tuple[Mode, float]] = [("rapid", 10.0), ("rapid", 500.0), ("lossless", 0.0), ("phat", 10.0)]
    for mode, eta in modes:
        speculation = SpeculationConfig(
            mode=mode, eta=eta, gamma=gamma, lookup=lookup, guard="paper", transfer_temperature=None
        )
        got = answer(speculation, GREEDY, texts=questions.greedy)
        assert got.tokens == questions.until_stop(), (mode, eta)
        if gamma:
            assert 0 < sum(got.accepted) < sum(got.drafted)
        if lookup == "on":
            assert sum(got.copied_accepted) > 0
        assert got.finish_reasons == ["stop" if questions.stop in row else "length" for row in questions.until_stop()]


@pytest.mark.parametrize(("gamma", "lookup"), [(0, "off"), (3, "on")])
def test_in_the_stacked_layout_too(questions, answer, gamma, lookup):
    target, drafter = questions.weights.decoder("stacked"), questions.weights.perturbed(0.1).decoder("stacked")
    got = answer(SpeculationConfig(mode="lossless", gamma=gamma, lookup=lookup), GREEDY, target=target, drafter=drafter)
    assert got.tokens == questions.until_stop()


def test_layers_that_are_read_from_stacks_keep_new_tokens_alone(questions, answer, from_stacks):
    """As on TPUs: the tails of all layers are written at once."""
    target, drafter = questions.weights.decoder("stacked"), questions.weights.perturbed(0.1).decoder("stacked")
    got = answer(SpeculationConfig(mode="lossless", gamma=3, lookup="on"), GREEDY, target=target, drafter=drafter)
    assert got.tokens == questions.until_stop() and from_stacks


def test_one_row_alone(questions, answer):
    for row, want in enumerate(questions.until_stop()):
        assert answer(SpeculationConfig(mode="lossless", gamma=3, lookup="on"), GREEDY, rows=[row]).tokens == [want]


def test_a_drafter_that_is_nearly_always_wrong(questions, answer):
    other = Weights.lively(VOCABULARY, seed=77).decoder()
    got = answer(SpeculationConfig(mode="lossless", gamma=3, lookup="off"), GREEDY, drafter=other)
    assert got.tokens == questions.until_stop()
    assert sum(got.accepted) < 0.2 * sum(got.drafted)


@pytest.mark.parametrize("lookup", ["off", "on"])
def test_the_target_as_its_own_drafter_is_always_right(questions, answer, lookup):
    """It is so only while its cache lacks nothing, full accepts included."""
    got = answer(
        SpeculationConfig(mode="lossless", gamma=3, lookup=lookup),
        GREEDY,
        drafter=questions.target,
        draft_prompts=questions.prompts,
        texts=questions.greedy,
    )
    assert got.tokens == questions.until_stop()
    assert got.accepted == got.drafted
    # Three drafts and a bonus a round, and nothing after an accepted stop token or the limit.
    assert got.rounds == [-(-len(row) // 4) for row in got.tokens]


class Script:
    """A schedule that was written down before."""

    def __init__(self, *calls: tuple[int, int]):
        self.calls, self.index = calls, -1
        self.seen: list[Observation] = []

    def choose(self) -> tuple[int, int]:
        self.index += 1
        return self.calls[self.index % len(self.calls)]

    def observe(self, gamma: int, seen: Observation) -> None:
        assert gamma == self.calls[self.index % len(self.calls)][0]
        self.seen.append(seen)


@pytest.fixture
def scheduled(monkeypatch):
    """Puts a schedule in the place of the one that the settings ask for."""

    def put(schedule):
        monkeypatch.setattr(pace_module, "gamma_schedule", lambda config, has_drafter: schedule)
        return schedule

    return put


def test_gamma_may_change_in_the_middle_of_an_answer(questions, answer, scheduled):
    """The drafter reads what it missed, be it one token or many, and rows that end keep their answer."""
    auto = SpeculationConfig(mode="lossless", gamma="auto", lookup="off")
    for calls in ([(5, 1), (0, 1)], [(0, 7), (5, 1)], [(0, 2), (5, 2), (0, 5)]):
        script = scheduled(Script(*calls))
        got = answer(auto, GREEDY)
        assert got.tokens == questions.until_stop(), calls
        assert got.gammas.keys() == {0, 5}
        assert sum(seen.emitted for seen in script.seen) == sum(map(len, got.tokens))
        assert sum(seen.rounds for seen in script.seen) == got.target_steps == sum(got.gammas.values())


def test_a_drafter_that_missed_rounds_drafts_as_if_it_had_not(questions, answer, scheduled):
    """The target as its own drafter is right about everything only if what it missed was read correctly."""
    scheduled(Script((0, 5), (5, 1)))
    got = answer(
        SpeculationConfig(mode="lossless", gamma="auto", lookup="off"),
        GREEDY,
        drafter=questions.target,
        draft_prompts=questions.prompts,
    )
    assert got.tokens == questions.until_stop()
    assert got.accepted == got.drafted and sum(got.drafted) > 0


def test_gamma_chosen_by_the_clock(questions, answer, scheduled):
    scheduled(AutoGamma(rounds_per_read=2, gammas=(0, 5)))
    got = answer(SpeculationConfig(mode="lossless", gamma="auto", lookup="off"), GREEDY)
    assert got.tokens == questions.until_stop()
    assert got.gammas.keys() == {0, 5}


def test_what_a_call_takes_beside_its_rounds_is_not_their_time(questions, answer, scheduled, monkeypatch):
    """A round of a call of one is timed as one of a call of five, where starting a call takes ten times as long."""
    run = Rounds._call

    def slow(self: Rounds, plan: Plan, rounds: int) -> None:
        run(self, plan, rounds)
        jax.block_until_ready(self.state)
        time.sleep(0.5 + 0.05 * rounds)

    monkeypatch.setattr(Rounds, "_call", slow)
    script = scheduled(Script((0, 1), (0, 5)))
    answer(SpeculationConfig(mode="lossless", gamma="auto", lookup="off"), GREEDY)
    took = [seen.seconds / seen.rounds for seen in script.seen]
    assert len(took) >= 4 and all(0.02 < each < 0.3 for each in took), took


@pytest.mark.parametrize(("rounds_per_read", "largest"), [(1, 1), (4, 8)])
def test_one_round_a_read_is_one_even_where_the_schedule_runs_several(
    questions, answer, scheduled, rounds_per_read, largest
):
    """A trial of the schedule has several rounds; whoever listens round by round hears of each."""
    script = scheduled(Script((0, 8)))
    heard: list[int] = []

    def listen(row: int, tokens: list[int], origins: list[int]) -> bool:
        heard.append(len(tokens))
        return False

    speculation = SpeculationConfig(mode="lossless", gamma="auto", lookup="off", rounds_per_read=rounds_per_read)
    got = answer(speculation, GREEDY, on_tokens=listen)
    assert got.tokens == questions.until_stop() and max(heard) == largest
    assert sum(seen.rounds for seen in script.seen) == got.target_steps


@pytest.mark.parametrize("limit", [19, 21, 22])
def test_a_limit_inside_a_draft_cuts_it(questions, answer, limit):
    sampling = SamplingConfig(temperature=0, max_new_tokens=limit)
    got = answer(SpeculationConfig(mode="lossless", gamma=3, lookup="off"), sampling)
    assert got.tokens == questions.until_stop(limit)
    assert all(accepted <= drafted for accepted, drafted in zip(got.accepted, got.drafted, strict=True))


def test_one_token(questions, answer):
    sampling = SamplingConfig(temperature=0, max_new_tokens=1)
    got = answer(SpeculationConfig(mode="lossless", gamma=3, lookup="off"), sampling)
    assert got.tokens == [row[:1] for row in questions.greedy]
    assert got.rounds == [1, 1, 1] and all(drafted <= 1 for drafted in got.drafted)
    assert [origins[0] == Origin.DRAFT for origins in got.origins] == [n == 1 for n in got.accepted]


@pytest.mark.parametrize(("penalize", "gamma"), [("generated", 3), ("all", 3), ("all", 0)])
def test_repetition_penalty(questions, answer, penalize, gamma):
    """Over what was said, or over the model's own prompt too: the target's prompt decides the target's answer."""
    sampling = SamplingConfig(temperature=0, max_new_tokens=LIMIT, repetition_penalty=1.3, penalize=penalize)
    want = [
        greedy(
            next_logits(questions.target),
            prompt,
            LIMIT,
            stops=[questions.stop],
            penalty=1.3,
            seen=prompt if penalize == "all" else (),
        )
        for prompt in questions.prompts
    ]
    assert want != questions.until_stop()
    got = answer(SpeculationConfig(mode="lossless", gamma=gamma, lookup="on"), sampling, texts=want)
    assert got.tokens == want
    assert sum(got.copied_accepted) > 0


@pytest.mark.parametrize("target_is_padded", [False, True])
def test_models_of_different_padded_vocabulary(questions, target_is_padded):
    """The extra ids would win every argmax if they were looked at."""
    small = questions.weights
    large = small.padded(VOCABULARY + 8, np.full(small.config.hidden_size, 5.0))
    large_sharp = next_logits(large.decoder())(questions.prompts[0])
    pair = (large, small) if target_is_padded else (small, large)
    target, drafter = (weights.decoder() for weights in pair)
    got = generate(
        prompted(target, questions.prompts[:1]),
        prompted(drafter, questions.prompts[:1]),
        speculation=SpeculationConfig(mode="lossless", gamma=3, lookup="off"),
        sampling=GREEDY,
        stops=(questions.stop,),
    )
    assert large_sharp.shape == (VOCABULARY + 8,)
    assert got.tokens == questions.until_stop()[:1] and got.accepted == got.drafted


def test_stop_tokens_may_lie_anywhere_in_a_round(questions, answer):
    """As an accepted draft: no bonus after it. As a correction or a bonus: it is the last of its round."""
    speculation = SpeculationConfig(mode="lossless", gamma=3, lookup="off")
    stopped = [row for row, tokens in enumerate(questions.until_stop()) if tokens[-1] == questions.stop]
    own = answer(speculation, GREEDY, drafter=questions.target, draft_prompts=questions.prompts)
    places = {(len(questions.until_stop()[row]) - 1) % 4 for row in stopped}
    assert places & {0, 1, 2}, "one of the stop tokens was meant to be a draft"
    for row in stopped:
        assert own.origins[row][-1] == (Origin.BONUS if (len(own.tokens[row]) - 1) % 4 == 3 else Origin.DRAFT)
    head = np.array(questions.weights.arrays["lm_head.weight"])
    head[questions.stop] = 0  # a drafter that never says stop: some other logit is above 0
    silent = Weights(questions.weights.config, {**questions.weights.arrays, "lm_head.weight": head}).decoder()
    got = answer(speculation, GREEDY, drafter=silent, draft_prompts=questions.prompts)
    assert got.tokens == questions.until_stop()
    for row in stopped:
        assert got.origins[row][-1] in (Origin.CORRECTION, Origin.BONUS)
    assert any(got.origins[row][-1] == Origin.CORRECTION for row in stopped)
