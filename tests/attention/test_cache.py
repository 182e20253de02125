# SPDX-License-Identifier: Apache-2.0
"""Prefix and tail: what is written is what is read, and a rollback is one length."""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_chunk, attend_prefix_tail, attend_self
from rapid_jax.attention.cache import KV, Prefix, Tail, capacity, empty_layers, write
from rapid_jax.attention.strategy import Strategy
from tests.reference import dense_attention, visible

N, K, H = 4, 2, 8


def tokens(seed: int, batch: int, time: int) -> tuple[Any, ...]:
    """Queries, keys and values [B, T, heads, H] of some tokens."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(batch, time, heads, H)).astype(np.float32) for heads in (N, K, K))


def empty(batch: int, slots: int) -> KV:
    layers = empty_layers(
        num_layers=1, batch=batch, kv_heads=K, slots=slots, head_dim=H, dtype=jnp.dtype(jnp.float32), stacked=False
    )
    assert isinstance(layers, tuple)
    return layers[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_write_puts_each_row_at_its_own_slot(batch):
    kv = KV(*(jnp.asarray(x.swapaxes(1, 2)) for x in tokens(1, batch, 12)[1:]))
    _, k_BTKH, v_BTKH = tokens(0, batch, 4)
    slot_B = jnp.asarray([5, 0, 8][:batch])
    got = jax.jit(write)(kv, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), slot_B)
    want_k, want_v = np.array(kv.k_BKSH), np.array(kv.v_BKSH)
    for row, slot in enumerate(slot_B.tolist()):
        want_k[row, :, slot : slot + 4] = k_BTKH[row].swapaxes(0, 1)
        want_v[row, :, slot : slot + 4] = v_BTKH[row].swapaxes(0, 1)
    np.testing.assert_array_equal(got.k_BKSH, want_k)
    np.testing.assert_array_equal(got.v_BKSH, want_v)


def test_write_keeps_the_dtype_of_the_cache():
    kv = KV(jnp.zeros((1, K, 4, H), jnp.bfloat16), jnp.zeros((1, K, 4, H), jnp.bfloat16))
    _, k_BTKH, v_BTKH = tokens(0, 1, 2)
    assert write(kv, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), jnp.asarray([1])).k_BKSH.dtype == jnp.bfloat16


@pytest.mark.parametrize("stacked", [False, True])
def test_a_rollback_changes_one_length(stacked):
    layers = empty_layers(
        num_layers=3, batch=2, kv_heads=K, slots=9, head_dim=H, dtype=jnp.dtype(jnp.float32), stacked=stacked
    )
    assert capacity(layers) == 9
    tail = Tail(layers, jnp.asarray([100, 7]), jnp.asarray([6, 2]))
    back = tail.rolled_back(jnp.asarray([4, 0]))
    for field in fields(Tail):
        if field.name != "length_B":
            assert getattr(back, field.name) is getattr(tail, field.name), field.name
    np.testing.assert_array_equal(back.slot_positions(), [[100, 101, 102, 103] + [-1] * 5, [-1] * 9])
    np.testing.assert_array_equal(back.slot_positions(extra=1), [[100, 101, 102, 103, 104] + [-1] * 4, [7] + [-1] * 8])


def test_chunks_one_after_another_are_one_shot_causal_attention():
    """Two rows, the second of which ends in the middle of the second chunk."""
    chunk, total = 6, 18
    q_BTNH, k_BTKH, v_BTKH = tokens(3, 2, total)
    pos_BT = jnp.asarray(np.stack([np.arange(total), np.where(np.arange(total) < 8, np.arange(total), -1)]))
    truth, kept = attend_self(pos_BT, Strategy(block=32))(q_BTNH, k_BTKH, v_BTKH, None)
    assert kept is None
    np.testing.assert_allclose(truth, dense_attention(q_BTNH, k_BTKH, v_BTKH, visible(pos_BT, pos_BT)), atol=1e-5)
    kv, pos_BS = empty(2, 24), jnp.full((2, 24), -1)
    for start in range(0, total, chunk):
        part = slice(start, start + chunk)
        attend = attend_chunk(pos_BT[:, part], Prefix((kv,), pos_BS, jnp.int32(start)), Strategy(block=chunk))
        out_BTNH, fresh = attend(q_BTNH[:, part], k_BTKH[:, part], v_BTKH[:, part], kv)
        np.testing.assert_allclose(out_BTNH, truth[:, part], atol=1e-5)
        kv = write(kv, fresh.k_BKSH, fresh.v_BKSH, jnp.full(2, start))
        pos_BS = pos_BS.at[:, part].set(pos_BT[:, part])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_tail_after_any_writes_and_rollbacks_is_a_fresh_computation(batch):
    """Steps of a few tokens, after each of which some are taken back; the rows take back different numbers."""
    rng = np.random.default_rng(batch)
    prompt_B, step, slots = np.array([11, 5])[:batch], 3, 40
    _, k_BSKH, v_BSKH = tokens(1, batch, 11)
    pos_BS = jnp.asarray(np.where(np.arange(11) < prompt_B[:, None], np.arange(11), -1))
    document = KV(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    prefix = Prefix((document,), pos_BS, jnp.int32(11))
    tail = Tail((empty(batch, slots),), jnp.asarray(prompt_B), jnp.zeros(batch, jnp.int32))
    kept_k, kept_v = ([np.zeros((0, K, H), np.float32)] * batch for _ in range(2))

    @jax.jit
    def attend(tail, q_BTNH, k_BTKH, v_BTKH):
        pos_BT = (tail.start_B + tail.length_B)[:, None] + jnp.arange(step)
        call = attend_prefix_tail(prefix, tail, pos_BT, Strategy(block=16))
        return call(q_BTNH, k_BTKH, v_BTKH, (document, tail.layers[0]))

    rolled_back = 0
    for turn in range(8):
        q_BTNH, k_BTKH, v_BTKH = tokens(10 + turn, batch, step)
        out_BTNH, kv = attend(tail, q_BTNH, k_BTKH, v_BTKH)
        for row in range(batch):
            keys = np.concatenate([k_BSKH[row, : prompt_B[row]], kept_k[row], k_BTKH[row]])
            values = np.concatenate([v_BSKH[row, : prompt_B[row]], kept_v[row], v_BTKH[row]])
            seen = np.tril(np.ones((len(keys), len(keys)), bool))[-step:]
            truth = dense_attention(q_BTNH[row : row + 1], keys[None], values[None], seen[None])
            np.testing.assert_allclose(out_BTNH[row], truth[0], atol=1e-5, err_msg=f"turn {turn}, row {row}")
        taken_B = rng.integers(0, step + 1, batch)
        rolled_back += int(np.sum(step - taken_B))
        kept_k = [np.concatenate([old, new[:taken]]) for old, new, taken in zip(kept_k, k_BTKH, taken_B, strict=True)]
        kept_v = [np.concatenate([old, new[:taken]]) for old, new, taken in zip(kept_v, v_BTKH, taken_B, strict=True)]
        tail = Tail((kv,), tail.start_B, tail.length_B).rolled_back(tail.length_B + jnp.asarray(taken_B))
    assert rolled_back > 4
