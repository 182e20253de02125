# SPDX-License-Identifier: Apache-2.0
"""An update against torch and against itself: loss, gradients and weights, of every objective, on one device and eight."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from longpo_jax.config import LongPOConfig
from longpo_jax.optimizer import transform_of
from longpo_jax.step import Step, TrainState
from rapid_jax.runtime import settings
from rapid_jax.runtime.mesh import make_mesh
from tests.longpo import oracles

TRUNK, TAIL = 64, 16
# Nothing rises where nothing is weighed: the preference has as much to say as the NLL.
SETTINGS = ("objective.beta=0.5", "objective.preference_weight=2.0", "optimizer.learning_rate=0.001")
SETTINGS += ("optimizer.warmup_ratio=0.0", "optimizer.eps=1e-5", f"train.lengths=[{TRUNK}]", f"train.tail={TAIL}", "train.rows_per_step=4")
SETTINGS += ("train.logits_chunk=8", "train.attention_block=8")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Of XLA's passes only those that are needed: the programs are many and run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@dataclass(frozen=True)
class Trained:
    """Three updates with the same four rows: what the first was made of, and what came of them."""

    step: Step
    metrics: list[dict[str, float]]
    gradients: dict[str, np.ndarray]  # of the first, by the checkpoint's names
    weights: dict[str, np.ndarray]  # after the last


def torch_model(tied: bool) -> Any:
    return oracles.model(tied=tied)


def objective_of(config: LongPOConfig) -> dict[str, Any]:
    return dataclasses.asdict(config.objective)


def config_of(*overrides: str) -> LongPOConfig:
    return settings.defaults(LongPOConfig, [*SETTINGS, *overrides])


def step_of(config: LongPOConfig, tied: bool) -> tuple[Step, TrainState]:
    count = config.mesh.devices
    mesh = None if count == 1 else make_mesh(config.mesh, jax.devices()[:count])
    decoder = oracles.decoder_of(torch_model(tied), mesh)
    step = Step(config, decoder, transform_of(config.optimizer, 10))
    return step, step.start(decoder)


def accumulated(step: Step, state: TrainState) -> Any:
    """The total of all four rows, in as many microbatches as the mesh needs."""
    rows, total = step.config.mesh.data * step.config.mesh.fsdp, None
    samples = [pair.sample(trunk=TRUNK, tail=TAIL, objective=step.config.objective.name) for pair in oracles.pairs()]
    for at in range(0, len(samples), rows):
        total = step.accumulate(state, total, step.place(samples[at : at + rows]))
    return total


def gradients_of(state: TrainState, total: Any) -> dict[str, np.ndarray]:
    sums, _, count = total
    return {key: array / float(count) for key, array in oracles.named(state.weights, sums).items()}


@cache
def trained(*overrides: str, tied: bool = True, updates: int = 3) -> Trained:
    step, state = step_of(config_of(*overrides), tied)
    metrics, gradients = [], {}
    for _ in range(updates):
        total = accumulated(step, state)
        gradients = gradients or gradients_of(state, total)
        state, means = step.update(state, total)
        metrics.append({name: float(value) for name, value in means.items()})
    return Trained(step, metrics, gradients, oracles.named(state.weights, nnx.state(state.weights)))


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """To 1e-5 of each array's largest entry."""
    assert got.keys() == want.keys()
    for key, array in got.items():
        size = np.abs(want[key]).max()
        print(key, np.abs(array - want[key]).max() / size, size)
        np.testing.assert_allclose(array, want[key], atol=1e-5 * size, rtol=0, err_msg=key)


ANSWERS_ALONE = ("objective.nll=response", "train.remat=layer")
CASES = {
    "longpo": ((), True),
    "longpo, untied, NLL of the answers": (ANSWERS_ALONE, False),
    "sft": (("objective.name=sft", "objective.nll_weight=0.5", "train.remat=none"), False),
    "solopo": (("objective.name=solopo", "objective.alpha=0.7"), True),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_separate_sequences_in_torch(case):
    overrides, tied = CASES[case]
    ours = trained(*overrides, tied=tied)
    config = objective_of(ours.step.config)
    means, gradients = oracles.metrics_and_gradients(torch_model(tied), oracles.pairs(), config)
    for name, value in means.items():
        np.testing.assert_allclose(ours.metrics[0][name], value, rtol=1e-5, err_msg=name)
    compare(ours.gradients, gradients)
    norm = np.sqrt(sum(np.sum(x**2) for x in gradients.values()))
    np.testing.assert_allclose(ours.metrics[0]["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes, case",
    [
        ({"context": 8}, "longpo"),
        ({"fsdp": 2, "context": 4}, "longpo"),
        ({"fsdp": 4, "context": 2}, "longpo"),  # all four rows at once; one device: one after the other
        ({"data": 2, "context": 2, "model": 2}, "longpo, untied, NLL of the answers"),
    ],
)
def test_eight_devices_are_one(sizes, case):
    overrides, tied = CASES[case]
    ours = trained(*overrides, *(f"mesh.{axis}={size}" for axis, size in sizes.items()), tied=tied)
    alone = trained(*overrides, tied=tied)
    compare(ours.gradients, alone.gradients)
    for one, other in zip(ours.metrics, alone.metrics, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for key, array in ours.weights.items():
        np.testing.assert_allclose(array, alone.weights[key], atol=1e-5, rtol=0, err_msg=key)
    assert np.abs(alone.weights["model.norm.weight"] - 1).min() > 1e-4
