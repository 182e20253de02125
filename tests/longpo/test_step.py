# SPDX-License-Identifier: Apache-2.0
"""An update against torch and against itself: loss, gradients, weights, of every objective, on one device and eight."""

import dataclasses
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime import settings
from rapid_jax.runtime.mesh import make_mesh
from tests.longpo import oracles

TRUNK, TAIL = 64, 16
# Nothing rises where nothing is weighed: the preference has as much to say as the NLL.
SETTINGS = ("objective.beta=0.5", "objective.preference_weight=2.0", "optimizer.learning_rate=0.001")
SETTINGS += (
    "optimizer.warmup_ratio=0.0",
    "optimizer.eps=1e-5",
    f"train.lengths=[{TRUNK}]",
    f"train.tail={TAIL}",
    "train.rows_per_step=4",
)
SETTINGS += ("train.logits_chunk=8", "train.attention_block=8")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's threads do not wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Trained:
    """Some updates with the same four rows: what the first was made of, and what came of all."""

    config: LongPOConfig
    means: dict[str, float]  # of the first's metrics
    gradients: dict[str, np.ndarray]  # of the first, by the checkpoint's names
    metrics: list[dict[str, float]]  # of each update
    weights: dict[str, np.ndarray]  # after the last
    compiled: list[str]  # XLA's programs, by name


def config_of(*overrides: str) -> LongPOConfig:
    return settings.defaults(LongPOConfig, [*SETTINGS, *overrides])


@cache
def step_of(*overrides: str, **model: Any) -> Step:
    config = config_of(*overrides)
    return Step(config, decoder_on(config, **model), transform_of(config.optimizer, 10))


def decoder_on(config: LongPOConfig, *, tied: bool = True, family: str = "llama") -> Decoder:
    count = config.mesh.devices
    mesh = make_mesh(config.mesh, jax.devices()[:count]) if count > 1 else None
    return oracles.decoder_of(oracles.model(tied=tied, family=family), mesh)


def started(*overrides: str, **model: Any) -> tuple[Step, TrainState]:
    """(the compiled programs, the state before the first update)."""
    step = step_of(*overrides, **model)
    return step, step.start(decoder_on(step.config, **model))


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


def numbers(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled meanwhile."""
    found: list[str] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(re.findall(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()))

    reader, logger = Reader(), logging.getLogger("jax")
    logger.addHandler(reader)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(reader)


@cache
def trained(*overrides: str, updates: int = 3, **model: Any) -> Trained:
    step, state = started(*overrides, **model)
    metrics = []
    with compilations() as compiled:
        total = accumulated(step, state)
        gradients = gradients_of(state, total)
        rows = step.config.mesh.data * step.config.mesh.fsdp
        means = {name: value * rows / 4 for name, value in numbers(total[1]).items()}
        for update in range(updates):
            state, found = step.update(state, total if update == 0 else accumulated(step, state))
            metrics.append(numbers(found))
    weights = oracles.named(state.weights, nnx.state(state.weights))
    return Trained(step.config, means, gradients, metrics, weights, compiled)


def torch_s(config: LongPOConfig, **model: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    objective = dataclasses.asdict(config.objective)
    return oracles.metrics_and_gradients(oracles.model(**model), oracles.pairs(), objective)


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """To 1e-5 of each array's largest entry."""
    assert got.keys() == want.keys()
    for key, array in got.items():
        size = np.abs(want[key]).max()
        np.testing.assert_allclose(array, want[key], atol=1e-5 * size, rtol=0, err_msg=key)


ANSWERS_ALONE = ("objective.nll=response", "train.remat=layer")
CASES = {
    "longpo": ((), True),
    "longpo, untied, NLL of the answers": (ANSWERS_ALONE, False),
    "sft": (("objective.name=sft", "objective.nll_weight=0.5", "train.remat=none"), False),
    "solopo": (("objective.name=solopo", "objective.alpha=0.7"), True),
    "opsd": (("objective.name=opsd", "objective.distillation_weight=0.7", "objective.nll=response"), False),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_separate_sequences_in_torch(case):
    overrides, tied = CASES[case]
    ours = trained(*overrides, tied=tied) if case.startswith("longpo") else trained(*overrides, tied=tied, updates=0)
    means, gradients = torch_s(ours.config, tied=tied)
    for name, value in means.items():
        np.testing.assert_allclose(ours.means[name], value, rtol=1e-5, err_msg=name)
    compare(ours.gradients, gradients)
    if ours.metrics:
        assert ours.metrics[0].items() >= ours.means.items() and ours.metrics[0]["finite"] == 1
        norm = np.sqrt(sum(np.sum(x**2) for x in gradients.values()))
        np.testing.assert_allclose(ours.metrics[0]["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("qwen3", {"fsdp": 2, "context": 2, "model": 2}),
        ("smollm3", {}),
        ("gemma3", {"fsdp": 2, "model": 2}),
        ("qwen3_moe", {"fsdp": 2, "context": 2, "model": 2}),
    ],
)
def test_other_families_are_trained_as_torch_trains_them(family, sizes):
    """Norms of q and k, whose gradient is a sum over heads on several devices; a layer without rotary embedding;
    windows of one layer of two, which training knows while it runs; Gemma's norms around, gelu and two ropes; experts,
    without an auxiliary loss.
    """
    mesh = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    ours = trained(*mesh, family=family, tied=True, updates=1)
    means, gradients = torch_s(ours.config, family=family, tied=True)
    compare(ours.gradients, gradients)
    np.testing.assert_allclose(ours.means["loss"], means["loss"], rtol=1e-5)
    if family == "qwen3":
        for key in ("model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"):
            assert ours.weights[key].shape == (16,) and np.abs(ours.weights[key] - 1).mean() > 1e-4


@pytest.mark.parametrize(
    "sizes, case",
    [
        ({"context": 8}, "longpo"),
        ({"fsdp": 4, "context": 2}, "longpo"),  # all four rows at once; one device: one after the other
        ({"data": 2, "context": 2, "model": 2}, "longpo, untied, NLL of the answers"),
    ],
)
def test_eight_devices_are_one(sizes, case):
    overrides, tied = CASES[case]
    mesh = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    ours = trained(*overrides, *mesh, tied=tied)
    alone = trained(*overrides, tied=tied)
    compare(ours.gradients, alone.gradients)
    for one, other in zip(ours.metrics, alone.metrics, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for key, array in ours.weights.items():
        np.testing.assert_allclose(array, alone.weights[key], atol=1e-5, rtol=0, err_msg=key)
    assert np.abs(alone.weights["model.norm.weight"] - 1).mean() > 1e-3
    for run in (ours, alone):  # once for all microbatches and updates
        assert run.compiled.count("_gradients") == run.compiled.count("_update") == 1


def test_a_teacher_s_distributions_are_those_of_one_device_on_eight():
    """A tail of two turns over four devices, a vocabulary over two: each token meets its own teacher."""
    overrides, tied = CASES["opsd"]
    sizes = ("mesh.context=4", "mesh.model=2")
    ours, alone = (trained(*overrides, *mesh, tied=tied, updates=0) for mesh in (sizes, ()))
    compare(ours.gradients, alone.gradients)
    for name, value in ours.means.items():
        np.testing.assert_allclose(value, alone.means[name], rtol=2e-5, err_msg=name)
    assert alone.means["kl"] > 0.5 and 0.01 < alone.means["teacher_rest"] < 0.9


@pytest.mark.parametrize("where", ["a weight", "a gradient"])
def test_what_is_not_finite_leaves_everything_as_it_was(where):
    step, state = started()
    if where == "a weight":
        state.weights.norm_D[...] = state.weights.norm_D[...].at[3].set(jnp.nan)
    total = accumulated(step, state)
    if where == "a gradient":
        sums, metrics, count = total
        sums.norm_D[...] = sums.norm_D[...].at[3].set(jnp.inf)
        total = sums, metrics, count
    before = jax.tree.map(np.array, jax.tree.leaves(state))
    state, metrics = step.update(state, total)
    assert not metrics["finite"] and int(state.step) == 0
    for old, new in zip(before, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old, new)
    if where == "a gradient":  # and training goes on
        state, metrics = step.update(state, accumulated(step, state))
        assert metrics["finite"] and int(state.step) == 1
        compare(oracles.named(state.weights, nnx.state(state.weights)), trained(updates=1).weights)


def test_one_step_down_the_gradient_raises_chosen_over_rejected():
    model, gradients = oracles.model(tied=True), trained().gradients

    def margins() -> np.ndarray:
        with torch.no_grad():
            sums = [
                [oracles.scores(model, pair.shared, branch)["sum"].item() for branch in (pair.chosen, pair.rejected)]
                for pair in oracles.pairs()
            ]
        return np.array(sums) @ [1, -1]

    before = margins()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter -= 1e-4 * torch.from_numpy(gradients[key])
    assert np.all(margins() > before)


def test_bfloat16_arithmetic_is_as_close_to_the_truth_as_torch_s():
    ours = trained("model.dtype=bfloat16", updates=1)
    means, truth = torch_s(ours.config, tied=True)
    objective = dataclasses.asdict(ours.config.objective)
    rounded = oracles.model(tied=True).bfloat16()
    theirs_means, theirs = oracles.metrics_and_gradients(rounded, oracles.pairs(), objective)

    def distance(gradients) -> float:
        return np.sqrt(sum(np.sum((gradients[key] - truth[key]) ** 2) for key in truth))

    assert 0 < distance(ours.gradients) <= 1.2 * distance(theirs)
    assert abs(ours.means["nll"] - means["nll"]) <= 0.01 * means["nll"] > abs(theirs_means["nll"] - means["nll"])
    exact = trained(updates=1).weights
    for key, array in ours.weights.items():  # kept in float32: an update of 1e-3 moves what is of order 1
        assert array.dtype == np.float32
        assert np.abs(array - exact[key]).max() <= 2.1e-3 and np.any(array != array.astype(jnp.bfloat16))
