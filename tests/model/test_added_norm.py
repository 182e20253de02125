# SPDX-License-Identifier: Apache-2.0
"""A sum and its norm by the GPU's kernel, interpreted, against the decoder's own; and a decoder's steps by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from rapid_jax.model import fused_decoder
from rapid_jax.model.added_norm import MOST_DEPTH, MOST_ROWS, added_norm
from rapid_jax.model.decoder import rms_norm
from rapid_jax.model.fused import fused
from tests.model.skinny_cases import EPS, normal
from tests.model.test_quantized import LLAMA, QWEN, Gpu, decoder_of, logits, stacked
from tests.model.test_quantized import _logits as jitted

pytestmark = pytest.mark.usefixtures("reads_inside")


def rows(rows: int, depth: int, dtype: str) -> tuple[jax.Array, ...]:
    shapes = (rows, depth), (rows, depth), (depth,)
    return tuple(normal(seed, *shape, dtype=jnp.dtype(dtype)) for seed, shape in enumerate(shapes))


@pytest.mark.parametrize("count, depth, dtype", [(1, 128, "float32"), (3, 96, "bfloat16"), (MOST_ROWS, 320, "float32")])
def test_it_is_the_sum_and_its_norm(count, depth, dtype):
    x_TD, added_TD, norm_D = rows(count, depth, dtype)
    sum_TD, normed_TD = added_norm(x_TD, added_TD, norm_D, eps=EPS, interpret=True)
    np.testing.assert_array_equal(sum_TD, x_TD + added_TD)
    want_TD = rms_norm(x_TD + added_TD, norm_D, EPS)
    assert normed_TD.dtype == want_TD.dtype == x_TD.dtype
    np.testing.assert_allclose(np.float64(normed_TD), np.float64(want_TD), rtol=1e-6 if dtype == "float32" else 2**-7)


def test_a_row_whose_mean_overflows_is_nan_and_zeros_are_zeros():
    x_TD, added_TD, norm_D = rows(3, 128, "float32")
    x_TD = x_TD.at[0].set(1e30).at[1].set(-added_TD[1])
    _, normed_TD = added_norm(x_TD, added_TD, norm_D, eps=EPS, interpret=True)
    assert np.isnan(normed_TD[0]).all() and not np.any(normed_TD[1]) and np.isfinite(normed_TD[2]).all()


@pytest.mark.parametrize(
    "shapes",
    [((2, 8), (1, 8), (8,)), ((2, 8), (2, 8), (2,)), ((MOST_ROWS + 1, 8),) * 2 + ((8,),), ((1, MOST_DEPTH + 1),) * 3],
)
def test_what_does_not_go_together_is_refused_while_tracing(shapes):
    with pytest.raises(ValueError, match="added_norm"):
        jax.eval_shape(lambda *x: added_norm(*x, eps=EPS), *(ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


@pytest.mark.parametrize("config, layout", [(QWEN, "unrolled"), (QWEN, "stacked"), (LLAMA, "unrolled")])
def test_a_decoder_in_full_says_the_same_by_it(config, layout, monkeypatch):
    decoder = fused(decoder_of(config) if layout == "unrolled" else stacked(decoder_of(config)))
    want, calls = logits(decoder), []

    def interpreted(*args, **kwargs):
        calls.append(args[0].shape)
        return added_norm(*args, interpret=True, **kwargs)

    monkeypatch.setattr(fused_decoder, "jax", Gpu())
    monkeypatch.setattr(fused_decoder, "added_norm", interpreted)
    jitted.clear_cache()
    np.testing.assert_allclose(logits(decoder), want, rtol=1e-5, atol=1e-5)
    # The first layer has nothing to add before its first norm; what the layers of a stack give each other is summed.
    assert len(calls) == (2 * config.num_layers - 1 if layout == "unrolled" else 1)
    jitted.clear_cache()
