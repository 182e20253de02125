# SPDX-License-Identifier: Apache-2.0
"""Packed rows by hand, in the order of every number of devices, and through the decoder against separate sequences."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longpo_jax.config import ObjectiveConfig
from longpo_jax.dialogue import Branch
from longpo_jax.rows import CHOSEN, PLACES, REJECTED, SHARED, Row, arrangement, batch_rows, needed, packed
from longpo_jax.scores import row_log_probs
from longpo_jax.step import losses
from rapid_jax.attention.attend import attend_fork, attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.runtime.errors import InputError
from tests.longpo import oracles

BEFORE = [10, 11, 12]
FIRST = Branch([20, 21, 2, 30, 22, 2], [1, 1, 1, 0, 2, 2])
SECOND = Branch([40, 2, 30, 41], [1, 1, 0, 2])
STRATEGY = Strategy(block=16)


def test_a_row_by_hand():
    assert needed(BEFORE, FIRST, SECOND) == (8, 4)
    row = packed(BEFORE, FIRST, SECOND, trunk=10, tail=6)
    assert (row.trunk, row.tail, row.reach) == (10, 6, 1)
    #        shared  the last and the chosen turns  empty | the last and the rejected turns  empty
    expected = {
        "tokens_T": [10, 11, *(12, 20, 21, 2, 30, 22), 0, 0, *(12, 40, 2, 30), 0, 0],
        "targets_T": [11, 12, *(20, 21, 2, 30, 22, 2), 0, 0, *(40, 2, 30, 41), 0, 0],
        "pos_T": [0, 1, *(2, 3, 4, 5, 6, 7), -1, -1, *(2, 3, 4, 5), -1, -1],
        "turn_T": [0, 0, *(1, 1, 1, 0, 2, 2), 0, 0, *(1, 1, 0, 2), 0, 0],
        "branch_T": [SHARED] * 2 + [CHOSEN] * 8 + [REJECTED] * 6,
    }
    for name, values in expected.items():
        assert getattr(row, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(row, name), values, err_msg=name)


def test_a_row_of_one_branch():
    assert needed(BEFORE, FIRST, None) == (8, 0)
    row = packed(BEFORE, FIRST, None, trunk=8, tail=0)
    np.testing.assert_array_equal(row.targets_T, [11, 12, 20, 21, 2, 30, 22, 2])
    empty = packed(BEFORE, FIRST, None, trunk=8, tail=4)
    np.testing.assert_array_equal(empty.pos_T[8:], [-1] * 4)
    assert not empty.turn_T[8:].any()


@pytest.mark.parametrize("trunk, tail", [(7, 4), (8, 3), (8, 0)])
def test_what_does_not_fit_is_an_input_error(trunk, tail):
    with pytest.raises(InputError, match=rf"a row of {trunk} \+ {tail} places does not hold a pair of 8 \+ 4 tokens"):
        packed(BEFORE, FIRST, SECOND, trunk=trunk, tail=tail)
    packed(BEFORE, FIRST, SECOND, trunk=8, tail=4)


def test_the_order_of_the_devices_by_hand():
    """Each device: its two pieces of the trunk, then its two pieces of the tail."""
    np.testing.assert_array_equal(arrangement(8, 4, 2), [0, 1, 6, 7, 8, 11, *(2, 3, 4, 5), *(9, 10)])
    np.testing.assert_array_equal(arrangement(4, 0, 2), [0, 3, 1, 2])
    np.testing.assert_array_equal(arrangement(3, 2, 1), np.arange(5))
    with pytest.raises(InputError, match="multiple of 8 tokens, got 12"):
        arrangement(16, 12, 4)


def sequences(fields: dict[str, np.ndarray]) -> list[list[tuple[int, ...]]]:
    """Of each branch (what is read, what it predicts, turn) by position, whatever the order of the places."""
    found = []
    for branch in (CHOSEN, REJECTED):
        mine = np.flatnonzero((fields["pos_BT"] >= 0) & np.isin(fields["branch_BT"], (SHARED, branch)))
        mine = mine[np.argsort(fields["pos_BT"][mine])]
        np.testing.assert_array_equal(fields["pos_BT"][mine], np.arange(mine.size))
        columns = (fields[name][mine].tolist() for name in ("tokens_BT", "targets_BT", "turn_BT"))
        found.append(list(zip(*columns, strict=True)))
    return found


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_token_is_kept_next_to_its_target_on_any_number_of_devices(devices):
    rows = [
        packed(BEFORE, FIRST, SECOND, trunk=16, tail=16),
        packed(BEFORE * 7, FIRST, SECOND, trunk=32, tail=16),
    ]
    batch = batch_rows(rows, trunk=48, devices=devices)
    assert {batch[name].shape for name in PLACES} == {(2, 64)}
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(batch["reach_B"], [1, 19])
    for b, before in enumerate((BEFORE, BEFORE * 7)):
        fields = {name: batch[name][b] for name in PLACES}
        for branch, got in zip((FIRST, SECOND), sequences(fields), strict=True):
            text, turns = before + branch.tokens, [0] * len(before) + branch.turns
            assert got == list(zip(text[:-1], text[1:], turns[1:], strict=True))
        empty = fields["pos_BT"] < 0
        assert empty.sum() == 64 - sum(needed(before, FIRST, SECOND))
        assert not any(fields[name][empty].any() for name in ("tokens_BT", "targets_BT", "turn_BT"))
        parts = fields["branch_BT"].reshape(devices, -1)  # each device has its share of the tail, behind its trunk
        assert np.all((parts == REJECTED) == (np.arange(64 // devices) >= 48 // devices))


@pytest.fixture(scope="module")
def decoder():
    return oracles.decoder_of(oracles.model(tied=True))


def batch_of(row: Row, **references: float):
    batch = batch_rows([row], trunk=row.trunk, devices=1)
    return {**batch} | {f"reference_{name}_B": np.array([value], np.float32) for name, value in references.items()}


def test_a_packed_row_is_its_two_sequences_apart(decoder):
    """The logits at every place, and through them what comes before."""
    pair = oracles.pairs()[0]
    row = packed(pair.shared, pair.chosen, pair.rejected, trunk=56, tail=12)
    batch = batch_of(row)
    graph, state = nnx.split(decoder)

    @partial(jax.jit, static_argnames="tail")
    def logits(state, tokens_BT, pos_BT, reach_B: Any = None, tail: int | None = None):
        decoder = nnx.merge(graph, state)
        attend = attend_self(pos_BT, STRATEGY) if tail is None else attend_fork(pos_BT, reach_B, STRATEGY, tail=tail)
        return decoder.logits(decoder.hidden(tokens_BT, pos_BT, attend)[0])

    together = np.asarray(logits(state, batch["tokens_BT"], batch["pos_BT"], batch["reach_B"], tail=12))[0]
    apart = np.full((2, 56), -1), np.zeros((2, 56), int)
    size = len(pair.shared) + len(pair.chosen.tokens), len(pair.shared) + len(pair.rejected.tokens)
    for b, branch in enumerate((pair.chosen, pair.rejected)):
        apart[0][b, : size[b]], apart[1][b, : size[b]] = np.arange(size[b]), pair.shared + branch.tokens
    first, second = np.asarray(logits(state, apart[1], apart[0]))
    assert np.abs(first).max() > 1
    np.testing.assert_allclose(together[: size[0] - 1], first[: size[0] - 1], atol=2e-5)
    shared, tail = len(pair.shared), len(pair.rejected.tokens)
    np.testing.assert_allclose(together[56 : 56 + tail], second[shared - 1 : size[1] - 1], atol=2e-5)
    assert np.abs(together[56] - first[shared]).max() > 1e-2  # a tail that saw the chosen answer would differ so


@pytest.fixture(scope="module")
def graded(decoder):
    """(row, places of its tail) -> (loss, metrics, gradient); beta and lambda let the preference matter."""
    graph, state = nnx.split(decoder, nnx.Param)
    config = ObjectiveConfig(beta=0.5, preference_weight=2.0)

    @partial(jax.jit, static_argnames="tail")
    def of(state, batch, tail):
        def loss(state):
            how = {"strategy": STRATEGY, "logits_chunk": 16}
            return losses(nnx.merge(graph, state), batch, config, tail=tail, short_tail=0, **how)

        return jax.value_and_grad(loss, has_aux=True)(state)

    def call(row: Row):
        (loss, metrics), gradient = of(state, batch_of(row, chosen=-38.5, rejected=-27.5), tail=row.tail)
        return float(loss), {name: float(value) for name, value in metrics.items()}, jax.tree.leaves(gradient)

    return call


def test_padding_never_changes_loss_or_gradient(graded):
    pair = oracles.pairs()[0]
    least = needed(pair.shared, pair.chosen, pair.rejected)
    (loss, metrics, gradient), (other_loss, other_metrics, other_gradient) = (
        graded(packed(pair.shared, pair.chosen, pair.rejected, trunk=trunk, tail=tail))
        for trunk, tail in (least, (64, 16))
    )
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(other_gradient, gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def test_what_pads_hold_does_not_matter_at_all(graded):
    pair = oracles.pairs()[0]
    row = packed(pair.shared, pair.chosen, pair.rejected, trunk=64, tail=16)
    before = graded(row)
    empty = row.pos_T < 0
    row.tokens_T[empty], row.targets_T[empty], row.turn_T[empty] = 5, 7, 1
    after = graded(row)
    assert after[:2] == before[:2]
    for a, b in zip(after[2], before[2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rejected_token_has_no_part_in_the_nll_and_a_chosen_one_none_in_the_rejected_reward(graded):
    pair = oracles.pairs()[0]

    def metrics(chosen: Branch, rejected: Branch):
        return graded(packed(pair.shared, chosen, rejected, trunk=64, tail=16))[1]

    def changed(branch: Branch, at: int) -> Branch:
        tokens = list(branch.tokens)
        tokens[at] = (tokens[at] + 1) % oracles.VOCABULARY
        return Branch(tokens, branch.turns)

    plain = metrics(pair.chosen, pair.rejected)
    cut = Branch(pair.chosen.tokens, [*pair.chosen.turns[:-1], -1])  # its end token is not the answer's, nor learnt
    unlearnt = metrics(cut, pair.rejected)
    assert unlearnt["nll"] != plain["nll"] and unlearnt["rewards/chosen"] != plain["rewards/chosen"]
    assert metrics(changed(cut, -1), pair.rejected) == unlearnt
    for at in (0, 4, -1):
        other = metrics(pair.chosen, changed(pair.rejected, at))
        assert all(other[name] == plain[name] for name in ("nll", "rewards/chosen"))
        assert other["rewards/rejected"] != plain["rewards/rejected"] and other["loss"] != plain["loss"]
        other = metrics(changed(pair.chosen, at), pair.rejected)
        assert other["rewards/rejected"] == plain["rewards/rejected"]
        assert other["nll"] != plain["nll"] and other["rewards/chosen"] != plain["rewards/chosen"]


def test_the_rows_of_a_batch_do_not_touch(decoder):
    """Each of two rows with different reach and lengths as if it were alone."""
    rows = [pair.sample(trunk=64, tail=16).row for pair in oracles.pairs()[:2]]
    graph, state = nnx.split(decoder)

    @jax.jit
    def of(state, batch):
        how = {"strategy": STRATEGY, "tail": 16, "logits_chunk": 16, "nll": "full"}
        return row_log_probs(nnx.merge(graph, state), batch, **how)

    both = of(state, batch_rows(rows, trunk=64, devices=1))
    for b, row in enumerate(rows):
        alone = of(state, jax.tree.map(jnp.asarray, batch_rows([row, row], trunk=64, devices=1)))
        for name, value in both.items():
            np.testing.assert_allclose(value[b], alone[name][0], rtol=1e-6, err_msg=name)
