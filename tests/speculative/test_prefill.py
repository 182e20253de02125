# SPDX-License-Identifier: Apache-2.0
"""Prompts into caches: chunk by chunk and in one pass, the keys and values are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.cache import KV, capacity
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.chunk_layout import bucket
from rapid_jax.speculative.extend import extend
from rapid_jax.speculative.prefill import new_tail, prefill
from tests.speculative.models import Weights

VOCABULARY = 16
CHUNK = 8


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.lively(VOCABULARY)


@pytest.fixture(scope="module", params=["unrolled", "stacked"])
def decoder(request, weights) -> Decoder:
    return weights.decoder(request.param)


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


@jax.jit
def _all_keys_and_values(decoder: Decoder, tokens_BT):
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    plain = attend_self(pos_BT, Strategy(block=64))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer):
        return plain(q_BTNH, k_BTKH, v_BTKH, layer)[0], (k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))

    return decoder.hidden(tokens_BT, pos_BT, attend)[1]


def in_one_pass(weights: Weights, prompt: list[int]) -> np.ndarray:
    """[layer, keys or values, K, T, H] of a whole prompt, by one forward pass without a cache."""
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(prompt)] = prompt
    kept = _all_keys_and_values(weights.decoder(), jnp.asarray(tokens))
    return np.stack([np.stack([np.asarray(x)[0, :, : len(prompt)] for x in layer]) for layer in kept])


def rows_of(layers, row: int, span: slice) -> np.ndarray:
    """The same of one row of a cache in either layout."""
    if isinstance(layers, KV):
        return np.stack([np.asarray(layers.k_BKSH), np.asarray(layers.v_BKSH)], axis=1)[:, :, row, :, span]
    return np.stack([np.stack([np.asarray(kv.k_BKSH), np.asarray(kv.v_BKSH)])[:, row, :, span] for kv in layers])


@pytest.mark.parametrize("lengths", [(24, 13), (25, 1), (17, 16), (5, 3)], ids=str)
def test_chunks_are_one_pass(decoder, weights, lengths):
    """The longest prompt ends at a chunk's end, one token behind it, inside a chunk, and before the first ends."""
    prompts = prompts_of(*lengths)
    prefix = prefill(decoder, prompts, chunk=CHUNK, dtype=jnp.dtype(jnp.float32))
    assert int(prefix.used) == max(lengths) <= capacity(prefix.layers) == prefix.pos_BS.shape[1]
    for row, prompt in enumerate(prompts):
        pos = np.asarray(prefix.pos_BS[row])
        np.testing.assert_array_equal(pos[: len(prompt)], np.arange(len(prompt)))
        assert np.all(pos[len(prompt) :] == -1)
        got = rows_of(prefix.layers, row, slice(0, len(prompt)))
        np.testing.assert_allclose(got, in_one_pass(weights, prompt), atol=2e-5)


def test_further_tokens_are_one_pass(decoder, weights):
    """Rows of different prefixes and suffixes, one of them without any; two widths of tokens."""
    prompts, cached, width = prompts_of(21, 30, 12), [16, 11, 12], 8
    heads = [prompt[:count] for prompt, count in zip(prompts, cached, strict=True)]
    prefix = prefill(decoder, heads, chunk=CHUNK, dtype=jnp.dtype(jnp.float32))
    tail = new_tail(decoder, cached, 32, jnp.dtype(jnp.float32))
    suffixes = [prompt[count:] for prompt, count in zip(prompts, cached, strict=True)]
    tail = extend(decoder, prefix, tail, suffixes, width=width, block_size=16)
    assert tail.length_B.tolist() == [5, 19, 0] and tail.start_B.tolist() == cached
    for row, prompt in enumerate(prompts):
        got = rows_of(tail.layers, row, slice(0, len(suffixes[row])))
        np.testing.assert_allclose(got, in_one_pass(weights, prompt)[..., cached[row] :, :], atol=2e-5)


def test_a_cache_may_be_of_a_smaller_type(weights):
    prompts = prompts_of(9, 4)
    prefix = prefill(weights.decoder(), prompts, chunk=CHUNK, dtype=jnp.dtype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(prefix.layers)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        rows_of(prefix.layers, 0, slice(0, 9)).astype(np.float32), in_one_pass(weights, prompts[0]), atol=0.1
    )


def test_progress_counts_every_position_once(weights):
    class Counter:
        units = 0

        def advance(self, units: int) -> None:
            self.units += units

    counter = Counter()
    prefill(weights.decoder(), prompts_of(25, 1), chunk=CHUNK, dtype=jnp.dtype(jnp.float32), progress=counter)
    assert counter.units == 25


@pytest.mark.parametrize("prompts", [[], [[1, 2], []]], ids=str)
def test_an_empty_prompt_is_refused(weights, prompts):
    with pytest.raises(InputError, match="at least one token in every prompt"):
        prefill(weights.decoder(), prompts, chunk=CHUNK, dtype=jnp.dtype(jnp.float32))


def test_prompts_of_one_bucket_share_their_programs(weights):
    decoder = weights.decoder()
    shapes = {
        tuple(leaf.shape for leaf in jax.tree.leaves(prefill(decoder, prompts_of(n, 3), chunk=CHUNK, dtype=dtype)))
        for n, dtype in ((17, jnp.dtype(jnp.float32)), (20, jnp.dtype(jnp.float32)), (24, jnp.dtype(jnp.float32)))
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("least", [1, 32, 512])
def test_buckets(least):
    """Each holds its count, is itself a bucket, wastes at most an eighth, and there are few of them."""
    counts = range(1, 200 * least + 1, max(least // 8, 1))
    sizes = [bucket(count, least) for count in counts]
    assert all(size >= count and size % least == 0 for count, size in zip(counts, sizes, strict=True))
    assert sizes == sorted(sizes)
    assert all(bucket(size, least) == size for size in set(sizes))
    waste = [1 - count / size for count, size in zip(counts, sizes, strict=True) if count >= 8 * least]
    assert 0 < max(waste) <= 1 / 8
    octaves = np.log2(200)
    assert len(set(sizes)) <= 8 * octaves + 1
    assert bucket(0, least) == least
