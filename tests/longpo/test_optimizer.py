# SPDX-License-Identifier: Apache-2.0
"""Updates as torch computes them, the schedule of the specification, moments of half the size."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from longpo_jax.config import OptimizerConfig
from longpo_jax.optimizer import schedule_of, transform_of

FLAT = {"schedule": "constant", "warmup_ratio": 0.0}


def rate_of(config: OptimizerConfig, steps: int, count: int) -> float:
    return float(np.asarray(schedule_of(config, steps)(count)))


def run(config: OptimizerConfig, start, gradients, steps: int = 100):
    """Weights after each gradient, and the last state."""
    transform: Any = transform_of(config, steps)
    weights: Any = jnp.asarray(start)
    state = transform.init(weights)
    found = []
    for gradient in gradients:
        updates, state = transform.update(jnp.asarray(gradient), state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(np.asarray(weights))
    return found, state


def test_rmsprop_takes_the_steps_of_the_oracle():
    """O7: torch's RMSprop on gradients of 1e-6; Optax's default would step by 9.9998e-09 first."""
    config = OptimizerConfig(name="rmsprop", learning_rate=5e-7, **FLAT)
    weights, _ = run(config, np.zeros(1, np.float32), [np.full(1, g, np.float32) for g in (2e-6, -1e-6, 3e-6)])
    steps = np.diff(np.concatenate([[0.0], np.ravel(weights).astype(np.float64)]))
    np.testing.assert_allclose(steps, [-4.76190476190476e-06, 2.148591661749503e-06, -3.916791816387454e-06], rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_updates_are_torchs(name, clip):
    random = np.random.default_rng(0)
    start = random.normal(size=(7, 5)).astype(np.float32)
    gradients = [random.normal(size=(7, 5), scale=scale).astype(np.float32) for scale in (1, 1e-6, 1e-3, 2, 1e-5)]
    decay = 0.1 if name == "adamw" else 0.0
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=decay, clip_norm=clip, **FLAT)
    weights = torch.nn.Parameter(torch.tensor(start))
    if name == "adamw":
        theirs = torch.optim.AdamW([weights], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    else:
        theirs = torch.optim.RMSprop([weights], lr=1e-2, alpha=0.99, eps=1e-8)
    ours, _ = run(config, start, gradients)
    for gradient, got in zip(gradients, ours, strict=True):
        weights.grad = torch.tensor(gradient)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([weights], clip)
        theirs.step()
        np.testing.assert_allclose(got, weights.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_the_norm_is_that_of_all_weights():
    config = OptimizerConfig(name="rmsprop", learning_rate=1.0, clip_norm=1.0, eps=1e8, **FLAT)  # g / eps: linear
    transform: Any = transform_of(config, 10)
    gradient = {"a": jnp.float32([3.0]), "b": jnp.float32([4.0])}
    updates, _ = transform.update(gradient, transform.init(gradient), gradient)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6e-8, -0.8e-8], rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "rate"),
    [
        (0, 8.880994671403197e-10),
        (280, 2.4955595026642986e-07),
        (562, 5e-7),
        (563, 5e-7),
        (2812, 2.935308826620023e-07),
        (3094, 2.5e-7),
        (5624, 4.8146582165314163e-14),
    ],
)
def test_the_schedule_is_the_oracles(count, rate):
    """O8, its warmup counted from 1; the paper's 45,000 documents, 8 an update."""
    assert rate_of(OptimizerConfig(), 5625, count) == pytest.approx(rate, rel=1e-6, abs=0)


def test_the_schedule_at_its_edges():
    flat = OptimizerConfig(schedule="constant")
    thirds = [5e-7 / 3, 5e-7 * 2 / 3, 5e-7, 5e-7]  # three updates of warmup, not four
    assert [rate_of(flat, 30, count) for count in (0, 1, 2, 29)] == pytest.approx(thirds)
    assert rate_of(OptimizerConfig(warmup_ratio=0.0), 4, 0) == pytest.approx(5e-7)
    assert rate_of(OptimizerConfig(warmup_ratio=1.0), 4, 3) == pytest.approx(5e-7)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50, 5625, 1_000_000])
def test_every_update_has_a_rate_above_0_and_none_above_the_peak(schedule, warmup, steps):
    config = OptimizerConfig(schedule=schedule, warmup_ratio=warmup, learning_rate=1e-20)
    counts = np.unique(np.concatenate([np.arange(min(steps, 60)), steps - 1 - np.arange(min(steps, 60))]))
    rates = np.asarray(schedule_of(config, steps)(counts))
    assert np.all(rates > 0) and np.all(rates <= np.float32(1e-20) * 1.0001)
    if steps == 1:
        assert rates == pytest.approx(1e-20)


def test_behind_the_warmup_the_rate_is_transformers():
    weights = torch.nn.Parameter(torch.zeros(1))
    theirs = get_cosine_schedule_with_warmup(torch.optim.SGD([weights], lr=1.0), 5, 50)
    for count in range(50):
        expected = (count + 1) / 5 if count < 5 else theirs.get_last_lr()[0]
        assert rate_of(OptimizerConfig(learning_rate=1.0), 50, count) == pytest.approx(expected, rel=1e-5)
        theirs.optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_small_moments_are_computed_in_float32(name, weights_dtype):
    """The update is that of float32 moments which are rounded between steps, and nothing else."""
    random = np.random.default_rng(1)
    gradients = [jnp.asarray(random.normal(size=64), jnp.float32) for _ in range(4)]
    weights = jnp.asarray(random.normal(size=64), weights_dtype)
    small: Any
    exact: Any
    small, exact = (
        transform_of(OptimizerConfig(name=name, moments_dtype=dtype, **FLAT), 10) for dtype in ("bfloat16", "float32")
    )
    state, reference = small.init(weights), exact.init(weights)
    sizes = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.size > 1}
    assert sizes == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(reference) if leaf.size > 1} == {"float32"}
    for gradient in gradients:
        updates, state = small.update(gradient, state, weights)
        expected, reference = exact.update(gradient, reference, weights)
        assert updates.dtype == jnp.float32
        np.testing.assert_array_equal(updates, expected)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.size > 1 else x, reference)
        chex.assert_trees_all_equal(state, rounded)
        reference = jax.tree.map(lambda x: x.astype(jnp.float32) if x.size > 1 else x, rounded)
