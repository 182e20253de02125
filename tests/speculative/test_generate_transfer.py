# SPDX-License-Identifier: Apache-2.0
"""Temperature 0 with transfer: tokens are the argmax of the enriched p-hat, by a plain reading of the rule."""

import pytest

from rapid_jax.speculative.config import Guard, Mode, SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Generation
from tests.reference import enriched_greedy
from tests.speculative.conftest import LIMIT
from tests.speculative.models import next_logits

GREEDY = SamplingConfig(temperature=0, max_new_tokens=LIMIT)
CASES: list[tuple[Mode, Guard, float, float, int]] = [
    ("rapid", "code", 10.0, 1.0, 3),
    ("rapid", "none", 4.0, 0.5, 2),
    ("phat", "paper", 20.0, 2.0, 4),
]


def truth(questions, row: int, eta: float, guard: Guard, temperature: float, gamma: int) -> list[int]:
    target, drafter = next_logits(questions.target), next_logits(questions.drafter)
    return enriched_greedy(
        lambda said: target([*questions.prompts[row], *said]),
        lambda said: drafter([*questions.draft_prompts[row], *said]),
        LIMIT,
        gamma=gamma,
        eta=eta,
        guard=guard,
        temperature=temperature,
        stops=(questions.stop,),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_drafted_position_has_the_argmax_of_p_hat(questions, answer, case):
    """Whatever prompt lookup copies, and alone or beside others."""
    mode, guard, eta, temperature, gamma = case
    want = [truth(questions, row, eta, guard, temperature, gamma) for row in range(3)]
    assert want != questions.until_stop()
    settings = {"mode": mode, "eta": eta, "gamma": gamma, "guard": guard, "transfer_temperature": temperature}
    plain = SpeculationConfig(**settings, lookup="off")
    got = answer(plain, GREEDY)
    assert got.tokens == want and 0 < sum(got.accepted) < sum(got.drafted)
    copying = answer(SpeculationConfig(**settings, lookup="on"), GREEDY, texts=want)
    assert copying.tokens == want and sum(copying.copied_accepted) > 0
    assert answer(plain, GREEDY, rows=[1]).tokens == want[1:2]


def test_seeds_change_nothing(questions, answer):
    found: list[Generation] = [
        answer(SpeculationConfig(gamma=3, lookup="off"), GREEDY, seeds=seeds) for seeds in ([0, 1, 2], [7, 8, 9])
    ]
    assert found[0].tokens == found[1].tokens


def test_without_eta_or_in_lossless_the_target_alone_decides(questions, answer):
    for mode, eta in (("rapid", 0.0), ("lossless", 10.0)):
        speculation = SpeculationConfig(mode=mode, eta=eta, gamma=3, lookup="off", transfer_temperature=7.0)
        assert answer(speculation, GREEDY).tokens == questions.until_stop()
