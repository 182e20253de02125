# SPDX-License-Identifier: Apache-2.0
"""The distribution of whole short answers: thousands of seeds as rows, against the one by enumeration.

Target and drafter are different models with different prompts over five tokens; the distribution is that of rounds in
which drafts are accepted, corrected and followed by a bonus, in float64.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from rapid_jax.model.decoder import Decoder
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import generate
from tests.reference import all_sequences, chi_square_p, one_step, sequence_distribution, softmax
from tests.speculative.models import Weights, logits_of, prompted

VOCABULARY, LENGTH, ROWS = 5, 3, 3072
TEMPERATURE = 0.9
PROMPT, DRAFT_PROMPT = [0, 3, 1, 4, 2, 2], [3, 1, 1, 2]


class Pair:
    """The two models, and each one's distribution after every sequence of up to LENGTH - 1 tokens."""

    def __init__(self, target: Decoder, drafter: Decoder, ids: Sequence[int] = range(VOCABULARY)):
        self.target, self.drafter, self.ids = target, drafter, np.asarray(ids)
        self.z = self._rows(self.target, PROMPT)
        self.zq = self._rows(self.drafter, DRAFT_PROMPT)

    def _rows(self, decoder, prompt) -> dict[tuple[int, ...], np.ndarray]:
        said = all_sequences(VOCABULARY, LENGTH)
        sequences = np.concatenate([np.tile(prompt, (len(said), 1)), self.ids[said]], axis=1)
        logits = logits_of(decoder, sequences)[:, len(prompt) - 1 :].astype(np.float64) / TEMPERATURE
        lacking = max(self.ids.max() + 1 - logits.shape[-1], 0)
        logits = np.pad(logits, ((0, 0), (0, 0), (0, lacking)), constant_values=-np.inf)[..., self.ids]
        return {tuple(row[:n].tolist()): z[n] for row, z in zip(said, logits, strict=True) for n in range(LENGTH)}

    def distribution(self, speculation: SpeculationConfig) -> np.ndarray:
        def step(said):
            return one_step(
                self.z[said],
                softmax(self.zq[said]),
                eta=speculation.effective_eta,
                guard=speculation.guard,
                exact_phat=speculation.mode == "phat",
            )

        return sequence_distribution(
            cache(step),
            lambda said: softmax(self.zq[said]),
            vocabulary=VOCABULARY,
            length=LENGTH,
            gamma=int(speculation.gamma),
            confidence_stop=speculation.confidence_stop,
        )

    def target_distribution(self) -> np.ndarray:
        distribution = np.zeros((VOCABULARY,) * LENGTH)
        for said in all_sequences(VOCABULARY, LENGTH).tolist():
            distribution[tuple(said)] = np.prod([softmax(self.z[tuple(said[:n])])[said[n]] for n in range(LENGTH)])
        return distribution

    def counts(self, speculation: SpeculationConfig, seed: int = 0) -> np.ndarray:
        got = generate(
            prompted(self.target, [PROMPT] * ROWS),
            prompted(self.drafter, [DRAFT_PROMPT] * ROWS),
            speculation=speculation,
            sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=LENGTH),
            stops=(),
            texts=[[*PROMPT, *np.random.default_rng(0).integers(0, VOCABULARY, 40).tolist()]] * ROWS,
            seeds=range(seed, seed + ROWS),
            token_ids=self.ids,
        )
        if speculation.lookup == "on":
            assert 0 < sum(got.copied_accepted) < sum(got.copied)
        if speculation.gamma:
            assert 0.2 < sum(got.accepted) / sum(got.drafted) < 0.95
        counts = np.zeros((VOCABULARY,) * LENGTH)
        assert np.isin(got.tokens, self.ids).all()
        np.add.at(counts, tuple(np.searchsorted(self.ids, got.tokens).T), 1)
        return counts


@pytest.fixture(scope="module")
def pair() -> Pair:
    weights = Weights.lively(VOCABULARY, sharpness=1.2)
    return Pair(weights.decoder(), weights.perturbed(0.3).decoder())


def speculation_of(mode: str, **more) -> SpeculationConfig:
    settings = {"eta": 4.0, "gamma": 2, "lookup": "off", "lookup_match": 1, "lookup_width": 2, "guard": "none"}
    return SpeculationConfig(mode=mode, **settings | more)  # pyright: ignore[reportArgumentType]


SPECULATIONS = {
    "lossless": speculation_of("lossless"),
    "lossless with copies": speculation_of("lossless", lookup="on"),
    "lossless by copies alone": speculation_of("lossless", lookup="on", gamma=0),
    "lossless with short drafts": speculation_of("lossless", confidence_stop=0.3),
    "rapid": speculation_of("rapid"),
    "rapid with copies": speculation_of("rapid", lookup="on"),
    "rapid with short drafts": speculation_of("rapid", confidence_stop=0.3),
    "phat": speculation_of("phat"),
}


@pytest.mark.parametrize("name", SPECULATIONS)
def test_answers_follow_their_distribution(pair, name):
    speculation = SPECULATIONS[name]
    distribution = pair.distribution(speculation)
    assert distribution.sum() == pytest.approx(1, abs=1e-12)
    if speculation.mode == "lossless":
        np.testing.assert_allclose(distribution, pair.target_distribution(), atol=1e-12)
    assert chi_square_p(pair.counts(speculation), distribution) > 1e-4


def test_the_laws_differ_and_the_test_would_notice(pair):
    """With eta above 0 the distribution is not the target's: what is drawn under one is refused by the other."""
    rapid, phat, short = (
        pair.distribution(SPECULATIONS[name]) for name in ("rapid", "phat", "rapid with short drafts")
    )
    target = pair.target_distribution()
    assert min(np.abs(a - b).sum() for a, b in ((rapid, target), (phat, target), (rapid, phat))) > 0.05
    assert np.abs(rapid - short).sum() > 0.01
    counts = pair.counts(SPECULATIONS["rapid"])
    assert chi_square_p(counts, target) < 1e-6
    assert chi_square_p(counts, phat) < 1e-6


@pytest.mark.parametrize("name", ["lossless", "rapid with copies"])
def test_answers_are_of_the_tokenizers_ids_whatever_rows_the_models_have(name):
    """Five tokens with holes between them, eight rows of the target, six of the drafter, which lacks the last token."""
    target, drafter = (Weights.lively(rows, sharpness=1.2, seed=5).decoder() for rows in (8, 6))
    pair = Pair(target, drafter, [0, 1, 2, 4, 6])
    distribution = pair.distribution(SPECULATIONS[name])
    if name == "lossless":
        np.testing.assert_allclose(distribution, pair.target_distribution(), atol=1e-12)
    assert distribution[4].sum() > 0.03, "the token that the drafter lacks was meant to occur"
    assert chi_square_p(pair.counts(SPECULATIONS[name]), distribution) > 1e-4
