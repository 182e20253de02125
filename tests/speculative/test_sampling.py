# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: equal to transformers' processors, and drawn as often as the distribution says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.sampling import (
    Draw,
    SamplingParams,
    SamplingRule,
    draw,
    penalize,
    position_keys,
    seen_after,
    seen_before_each,
    warp,
)
from tests.reference import chi_square_p, softmax

V = 40
SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-k of everything": {"top_k": V + 10},
    "top-p": {"top_p": 0.8},
    "top-p of almost nothing": {"top_p": 1e-6},
    "min-p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.08, "repetition_penalty": 1.2},
}


def logits_and_history() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(16, V)) * 3).astype(np.float32), rng.integers(0, V, (16, 7))


def ours(logits: np.ndarray, history: np.ndarray, config: SamplingConfig) -> np.ndarray:
    rule, params = SamplingRule.of(config, SpeculationConfig(), ()), SamplingParams.of(config, SpeculationConfig())
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, history, True, axis=1)
    return np.asarray(jax.jit(warp, static_argnums=1)(jnp.asarray(logits), rule, params, jnp.asarray(seen)))


def theirs(logits: np.ndarray, history: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """transformers' processors in the order in which its `generate` applies them."""
    processors: list[Any] = [transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    processors.append(transformers.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(transformers.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(transformers.MinPLogitsWarper(config.min_p))
    scores = torch.from_numpy(logits)
    for processor in processors:
        scores = processor(torch.from_numpy(history), scores)
    return scores.numpy()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_filters_are_those_of_transformers(settings):
    logits, history = logits_and_history()
    config = SamplingConfig(**settings)
    got, want = ours(logits, history, config), theirs(logits, history, config)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(got).sum(axis=-1) >= 1)
    if settings.keys() & {"top_p", "min_p"}:
        assert np.isinf(got).any()


def kept_by_both(z: np.ndarray, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of logits [rows, V] stay, and which of them stay in transformers."""
    config, history = SamplingConfig(**settings), np.zeros((len(z), 1), int)
    return np.isfinite(ours(z, history, config)), np.isfinite(theirs(z, history, config))


def test_tokens_that_are_equal_at_an_edge():
    """Top-k keeps all that equal the last of k, and the nucleus is of them all."""
    got, want = kept_by_both(np.array([[2, 1, 1, 1, 0]], np.float32), top_k=2, top_p=0.6)
    assert got.tolist() == want.tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("top_k", [0, 1, 3, 8])
@pytest.mark.parametrize("size", [12, 60])
def test_a_nucleus_of_many_equal_logits_is_that_of_transformers(size, top_k):
    """Above 16 tokens torch sorts equal ones in no order: what is kept is then the same but for the ids."""
    rng = np.random.default_rng(size + top_k)
    z = rng.integers(-2, 3, (64, size)).astype(np.float32)
    z[0], z[1:8, ::5] = 0, -np.inf
    for top_p in (0.1, 0.3, 0.5, 0.6, 0.9, 0.95, 0.999):
        got, want = kept_by_both(z, top_k=top_k, top_p=top_p)
        if size > 16:
            got, want = (np.sort(np.where(kept, z, -np.inf), axis=-1) for kept in (got, want))
        np.testing.assert_array_equal(got, want)


def test_order_is_penalty_temperature_filters():
    """The nucleus is of the tempered distribution, and the penalty comes before the temperature divides."""
    logits, history = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)), np.array([[0]])
    hot = ours(logits, history, SamplingConfig(temperature=4.0, top_p=0.6))
    cold = ours(logits, history, SamplingConfig(temperature=0.25, top_p=0.6))
    assert np.isfinite(hot).sum() == 3 and np.isfinite(cold).sum() == 1
    penal = ours(logits, history, SamplingConfig(temperature=2.0, repetition_penalty=3.0, top_k=1))
    assert np.isfinite(penal)[0].tolist() == [False, True, False, False]
    np.testing.assert_allclose(penal[0, 1], np.log(0.3) / 2, rtol=1e-6)


def test_a_penalty_lowers_seen_logits_of_either_sign():
    got = penalize(jnp.asarray([2.0, -2.0, 0.0, 2.0]), jnp.asarray([True, True, True, False]), jnp.float32(2))
    np.testing.assert_array_equal(got, [1.0, -4.0, 0.0, 2.0])


def test_greedy_penalises_and_filters_nothing():
    logits, history = logits_and_history()
    config = SamplingConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=1.5)
    got = ours(logits, history, config)
    np.testing.assert_allclose(got, theirs(logits, history, SamplingConfig(repetition_penalty=1.5)), rtol=1e-6)
    rule = SamplingRule.of(config, SpeculationConfig(), ())
    keys = position_keys(jax.random.split(jax.random.key(0), 16), Draw.TOKEN, jnp.zeros(16, jnp.int32), 1)
    drawn = draw(keys, jnp.asarray(got)[:, None], rule, SamplingParams.of(config, SpeculationConfig()))
    np.testing.assert_array_equal(drawn[:, 0], got.argmax(axis=-1))


def test_settings_that_greedy_ignores_compile_nothing_anew():
    plain = SamplingRule.of(SamplingConfig(temperature=0), SpeculationConfig(transfer_temperature=None), (3, 1, 3))
    other = SamplingConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.3)
    assert SamplingRule.of(other, SpeculationConfig(mode="lossless", guard="paper"), (1, 3)) == plain
    moved = SamplingRule.of(other, SpeculationConfig(mode="phat"), (1, 3))
    assert moved.transfer and moved == SamplingRule.of(other, SpeculationConfig(transfer_temperature=0.5), (1, 3))
    assert plain.stops == (1, 3)
    rows = [SpeculationConfig(eta=0.0), SpeculationConfig(mode="phat"), SpeculationConfig(eta=3.0, guard="paper")]
    rules = [SamplingRule.of(other, row, (1, 3)) for row in (*rows, SpeculationConfig(mode="lossless"))]
    assert len({rule.widened(transfers=True) for rule in rules}) == 1
    every = SamplingRule.of(SamplingConfig(), SpeculationConfig(), (1, 3)).widened(transfers=False)
    assert {rule.widened(transfers=False) for rule in rules} == {plain, every}, "those that the drafter moves sample"
    warm = [
        SamplingRule.of(SamplingConfig(temperature=1, seed=0), SpeculationConfig(mode="rapid", eta=10), ()),
        SamplingRule.of(SamplingConfig(temperature=0.1, seed=7), SpeculationConfig(mode="lossless", eta=0), ()),
        SamplingRule.of(SamplingConfig(temperature=2, seed=1), SpeculationConfig(mode="rapid", eta=50), ()),
    ]
    assert len(set(warm)) == 1


def test_tokens_are_drawn_as_often_as_they_are_probable():
    z = np.array([1.0, -1.0, 0.5, -np.inf, 2.0])
    rule = SamplingRule.of(SamplingConfig(), SpeculationConfig(), ())
    keys = position_keys(jax.random.split(jax.random.key(1), 50_000), Draw.TOKEN, jnp.zeros(50_000, jnp.int32), 2)
    params = SamplingParams.of(SamplingConfig(), SpeculationConfig())
    rows = jnp.broadcast_to(jnp.float32(z), (50_000, 2, 5))
    tokens = np.asarray(jax.jit(draw, static_argnums=2)(keys, rows, rule, params))
    assert chi_square_p(np.bincount(tokens.ravel(), minlength=5), softmax(z)) > 1e-4
    # The two positions are independent.
    assert chi_square_p(np.bincount(tokens @ [5, 1], minlength=25), np.outer(softmax(z), softmax(z))) > 1e-4


def test_every_purpose_and_position_has_a_key_of_its_own():
    rows = jax.random.split(jax.random.key(0), 3)
    at = jnp.asarray([0, 5, 9])
    purposes = (Draw.DRAFT, Draw.ACCEPT, Draw.TOKEN)
    data = [np.asarray(jax.random.key_data(position_keys(rows, use, at, 6))).reshape(-1, 2) for use in purposes]
    assert len(np.unique(np.concatenate(data), axis=0)) == 3 * 3 * 6


def test_a_key_depends_on_the_position_and_not_on_where_the_round_began():
    row = jax.random.split(jax.random.key(0), 1)
    early = jax.random.key_data(position_keys(row, Draw.DRAFT, jnp.asarray([4]), 5))
    late = jax.random.key_data(position_keys(row, Draw.DRAFT, jnp.asarray([6]), 3))
    np.testing.assert_array_equal(early[:, 2:], late)


def test_what_was_seen_before_each_token_and_after_some():
    seen = jnp.asarray([[False, True, False, False]])
    tokens = jnp.asarray([[3, 3, 0]])
    want = [[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1]]
    np.testing.assert_array_equal(seen_before_each(seen, tokens), np.array([want], bool))
    for taken in range(4):
        np.testing.assert_array_equal(seen_after(seen, tokens, jnp.asarray([taken])), np.array([want[taken]], bool))
    assert seen_before_each(None, tokens) is None and seen_after(None, tokens, jnp.asarray([1])) is None


def test_stop_tokens():
    rule = SamplingRule.of(SamplingConfig(), SpeculationConfig(), (2, 7))
    np.testing.assert_array_equal(rule.is_stop(jnp.asarray([[1, 2], [7, 70]])), [[False, True], [True, False]])
    assert not SamplingRule.of(SamplingConfig(), SpeculationConfig(), ()).is_stop(jnp.arange(5)).any()


@pytest.mark.parametrize(
    ("config", "bad"),
    [
        (SamplingConfig, {"temperature": -0.1}),
        (SamplingConfig, {"temperature": float("nan")}),
        (SamplingConfig, {"top_k": -1}),
        (SamplingConfig, {"top_p": 0.0}),
        (SamplingConfig, {"min_p": 1.1}),
        (SamplingConfig, {"repetition_penalty": 0.0}),
        (SamplingConfig, {"max_new_tokens": 0}),
        (SamplingConfig, {"seed": -1}),
        (SpeculationConfig, {"eta": -1.0}),
        (SpeculationConfig, {"eta": float("inf")}),
        (SpeculationConfig, {"gamma": 65}),
        (SpeculationConfig, {"alpha": 1.5}),
        (SpeculationConfig, {"confidence_stop": 1.0}),
        (SpeculationConfig, {"lookup_width": 0}),
        (SpeculationConfig, {"lookup_match": 17}),
        (SpeculationConfig, {"rounds_per_read": 0}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(config, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        config(**bad)
