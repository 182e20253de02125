# SPDX-License-Identifier: Apache-2.0
"""Predicted speed: against the numbers of one model worked out by hand, and what is said of it."""

from pathlib import Path

import jax
import pytest

from rapid_jax.config import RapidConfig
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.plan.speed import ACCEPTANCES, MOST_GAMMA, SMALL_SECONDS, predicted, said
from rapid_jax.plan.topologies import GENERATIONS
from rapid_jax.runtime import settings
from rapid_jax.speculative.schedule import GAMMAS

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "rapid" / "llama31_8b_128k_v5p_2x2x1.yaml"
CHIP = GENERATIONS["v5p"]


def prediction(*overrides: str):
    config = settings.load(RapidConfig, CONFIG, list(overrides))
    target = architecture_of(config.models.target)  # the folder is not there: the published one of its name
    assert config.models.max_context is not None
    return predicted(config, tuple(jax.devices()[:4]), target, None, config.models.max_context, CHIP)


def by_hand(tokens: int, prompt: int, item: int = 2, kv: float = 2) -> float:
    """Llama-3.1-8B over four v5p chips: bytes, and two sums of [8 or 16 rows, 4096] a layer."""
    matrices = 32 * 4096 * ((2 * 32 + 2 * 8) * 128 + 3 * 14336) + 4096 * 128256
    cache = 2 * 32 * 8 * 128 * prompt
    rows = 8 if tokens <= 8 else 16
    return (item * matrices + kv * cache) / 4 / 2765e9 + 64 * rows * 4096 * 2 / 100e9


@pytest.mark.parametrize(
    ("gamma", "weights", "kv"), [(3, "full", "full"), (10, "full", "full"), (3, "int8", "full"), (5, "int8", "int8")]
)
def test_a_speed_is_bytes_and_sums_over_chips(gamma, weights, kv):
    """A copy in 8 bits reads its prompt in 8 bits, too; quantised keys and values are a byte, and 4 for each 128."""
    found = prediction(f"speculation.gamma={gamma}", f"models.drafter_weights={weights}", f"compute.kv={kv}")
    assert found is not None
    long, short = 131072 - 1024 - 256, 5632 + 256 - 2  # 1/24 of the prompt in chunks of 512, and the question
    item, cached = {"full": (2, 2), "int8": (1, 1 + 4 / 128)}[weights]
    document = {"full": 2, "int8": 1 + 4 / 128}[kv]
    plain = by_hand(1, long, kv=document)
    ours, theirs = (32 * SMALL_SECONDS[each] for each in ("full", "full" if weights == "full" else "quantised"))
    assert found.plain.least == pytest.approx(plain, rel=0.01)
    assert found.plain.most == pytest.approx(plain + ours, rel=0.01)
    for speed, acceptance in zip(found.given, ACCEPTANCES, strict=True):
        tokens = (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
        least = (gamma * by_hand(1, short, item, cached) + by_hand(gamma + 1, long, kv=document)) / tokens
        most = least + (gamma * theirs + ours) / tokens
        assert (speed.acceptance, speed.gamma) == (acceptance, gamma)
        assert (speed.token.least, speed.token.most) == (pytest.approx(least, rel=0.01), pytest.approx(most, rel=0.01))
        ratios = sorted((plain / least, (plain + ours) / most))
        assert speed.ratio == (pytest.approx(ratios[0], rel=0.02), pytest.approx(ratios[1], rel=0.02))


def test_the_best_has_the_most_tokens_a_second():
    found = prediction()
    assert found is not None and [speed.acceptance for speed in found.best] == list(ACCEPTANCES)
    for at, speed in enumerate(found.best):
        for gamma in range(1, MOST_GAMMA + 1):
            other = prediction(f"speculation.gamma={gamma}")
            assert other is not None
            token = other.given[at].token
            assert speed.token.least + speed.token.most <= token.least + token.most + 1e-12
    assert [speed.gamma for speed in found.best] == sorted([speed.gamma for speed in found.best], reverse=True)


def test_auto_is_of_its_own_gammas_and_without_a_drafter_there_is_nothing():
    auto = prediction("speculation.gamma=auto")
    assert auto is not None and auto.given == [] and all(speed.gamma in GAMMAS for speed in auto.best)
    assert prediction("speculation.mode=target") is None


def test_what_is_said():
    found = prediction("speculation.gamma=10")
    assert found is not None
    first, plain, *best, good, _, bad = said(found)
    assert "not measured" in first and plain.endswith(" ms a token")
    assert [line.split()[0] for line in best] == ["0.9", "0.7", "0.5"]
    assert "10 drafts a round, 0.9 accepted" in good and bad.endswith("slower than plain decoding")
    assert found.to_json()["as_set"][0]["gamma"] == 10 and len(found.to_json()["best"]) == 3
