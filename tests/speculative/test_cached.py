# SPDX-License-Identifier: Apache-2.0
"""What the caches hold after any accepts and rejections is what a fresh pass over the answer computes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.cache import KV
from rapid_jax.speculative.accept import augment, leading_accepts
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.prefill import prefill
from rapid_jax.speculative.state import Origin
from tests.speculative.conftest import LIMIT
from tests.speculative.models import logits_of

generate_module = importlib.import_module("rapid_jax.speculative.generate")
rounds_module = importlib.import_module("rapid_jax.speculative.rounds")
WARM = SamplingConfig(temperature=0.8, max_new_tokens=LIMIT, seed=5)


@pytest.fixture
def last_state(monkeypatch):
    """The states that the device program returned; every one but the last was given up to the next call."""
    states = []
    run_rounds = rounds_module.run_rounds

    def recorded(*arguments, **settings):
        states[:] = [run_rounds(*arguments, **settings)]
        return states[0]

    monkeypatch.setattr(rounds_module, "run_rounds", recorded)
    return states


def check_tail(decoder, tail, sequences, lengths) -> None:
    """The tail's slots against a prefill of the whole sequence."""
    fresh = prefill(decoder, sequences, chunk=64, dtype=jnp.dtype(jnp.float32)).layers
    assert isinstance(fresh, tuple)
    for row, length in enumerate(lengths):
        start = int(tail.start_B[row])
        for got, want in zip(tail.layers, fresh, strict=True):
            for name in ("k_BKSH", "v_BKSH"):
                mine = np.asarray(getattr(got, name))[row, :, :length]
                theirs = np.asarray(getattr(want, name))[row, :, start : start + length]
                np.testing.assert_allclose(mine, theirs, atol=5e-5, err_msg=f"row {row}, {name}")


@pytest.mark.parametrize("lookup", ["off", "on"])
def test_caches_after_random_accepts_and_rejections(questions, answer, last_state, lookup):
    speculation = SpeculationConfig(eta=3.0, gamma=3, lookup=lookup)
    got = answer(speculation, WARM, texts=questions.greedy)
    assert 0 < sum(got.accepted) < sum(got.drafted)
    ends = {origin for row in got.origins for origin in row}
    assert {Origin.DRAFT, Origin.CORRECTION} <= ends
    state = last_state[0]
    said = [prompt + tokens for prompt, tokens in zip(questions.prompts, got.tokens, strict=True)]
    expected = [len(row) - 1 for row in said] - np.asarray(state.target_tail.start_B)
    assert state.target_tail.length_B.tolist() == expected.tolist()
    check_tail(questions.target, state.target_tail, said, expected)
    drafted = [prompt + tokens for prompt, tokens in zip(questions.draft_prompts, got.tokens, strict=True)]
    at_least = [len(row) - 2 for row in drafted] - np.asarray(state.draft_tail.start_B)
    assert np.all(np.asarray(state.draft_tail.length_B) >= at_least)
    check_tail(questions.drafter, state.draft_tail, drafted, at_least)


def test_the_documents_prefix_is_only_read(questions, answer, last_state):
    """The same prefix serves a second question: nothing of it was given away or written."""
    target = generate_module.Prompted(
        questions.target,
        questions.prompts,
        prefill(questions.target, [p[:-2] for p in questions.prompts], chunk=16, dtype=jnp.dtype(jnp.float32)),
        [len(p) - 2 for p in questions.prompts],
    )
    before = [np.array(leaf) for leaf in jax.tree.leaves(target.prefix)]
    sampling = SamplingConfig(temperature=0, max_new_tokens=LIMIT)
    for _ in range(2):
        got = generate_module.generate(
            target, None, speculation=SpeculationConfig(lookup="off"), sampling=sampling, stops=(questions.stop,)
        )
        assert got.tokens == questions.until_stop()
    for old, leaf in zip(before, jax.tree.leaves(target.prefix), strict=True):
        np.testing.assert_array_equal(old, leaf)
    assert isinstance(target.prefix.layers[0], KV)


def test_bfloat16_decides_as_float32_does_away_from_ties(questions):
    """A draft at every position of some sequences; only where log r is near the log ratio may the two differ."""
    weights = questions.weights
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, weights.config.vocab_size, (16, 24))
    noise = rng.gumbel(size=(16, 23, weights.config.vocab_size))
    ratios, drafts = [], None
    for dtype in (jnp.float32, jnp.bfloat16):
        target, drafter = (w.decoder(dtype=jnp.dtype(dtype)) for w in (weights, weights.perturbed(0.6)))
        z = jnp.asarray(logits_of(target, tokens))[:, :-1]
        log_q = jax.nn.log_softmax(jnp.asarray(logits_of(drafter, tokens))[:, :-1])
        log_p_hat = augment(z, log_q, eta=jnp.float32(5), alpha=jnp.float32(0.1), guard="code")
        if drafts is None:  # drawn once, from the float32 drafter
            drafts = np.argmax(log_q + noise, axis=-1)[..., None]
        ratios.append(np.take_along_axis(np.asarray(log_p_hat - log_q), drafts, axis=-1)[..., 0].reshape(-1, 1))
    log_r = np.log(rng.random(ratios[0].shape))
    one = jnp.ones(len(log_r), jnp.int32)
    full, half = (np.asarray(leading_accepts(jnp.asarray(x), jnp.asarray(log_r), one)) for x in ratios)
    clear = np.abs(ratios[0] - log_r)[:, 0] > 0.3
    assert clear.mean() > 0.5 and 0.1 < full[clear].mean() < 0.9
    np.testing.assert_array_equal(full[clear], half[clear])
    assert np.median(np.abs(ratios[0] - ratios[1])) < 0.1
