# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts against ten lines that loop over tokens, and grouped products against every expert at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.megablox import gmm

from rapid_jax.model import grouped_kernel
from rapid_jax.model.experts import Grouped, mixture
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.grouped import Grouping, _megablox_tiling, grouped_product, tiles_of
from rapid_jax.model.quantized import WeightBits, dequantize, quantize_weights
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

D, F, X = 32, 24, 5
EXPERTS = Experts(count=X, per_token=2, ffn=F, normalized=True)
SIZES = {  # rows of each expert
    "some without rows": (3, 0, 40, 1, 0),
    "all to one": (0, 0, 0, 44, 0),
    "the first and the last": (20, 0, 0, 0, 24),
}


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def weights() -> dict[str, jax.Array]:
    shapes = {"router": (D, X), "gate": (X, D, F), "up": (X, D, F), "down": (X, F, D)}
    return {name: drawn(*shape, seed=at) * 0.3 for at, (name, shape) in enumerate(shapes.items())}


def truth(h_TD: jax.Array, w: dict[str, jax.Array], experts: Experts) -> jax.Array:
    """Every token by itself, in float32."""
    out = []
    for h_D in h_TD:
        p_X = jax.nn.softmax(jnp.dot(h_D, w["router"], precision="highest"))
        best = sorted(range(X), key=lambda x: (-float(jax.lax.stop_gradient(p_X[x])), x))[: experts.per_token]
        total = sum(p_X[x] for x in best) if experts.normalized else 1.0
        y_D = jnp.zeros(D)
        for x in best:
            g, u = (jnp.dot(h_D, w[name][x], precision="highest") for name in ("gate", "up"))
            y_D += p_X[x] / total * jnp.dot(jax.nn.silu(g) * u, w["down"][x], precision="highest")
        out.append(y_D)
    return jnp.stack(out)


def run(h_BTD: jax.Array, w: dict[str, jax.Array], experts: Experts = EXPERTS, mesh: Any = None) -> jax.Array:
    matrices = (Grouped(w[name]) for name in ("gate", "up", "down"))
    return mixture(h_BTD, w["router"], *matrices, experts=experts, mesh=mesh)


def both(function: Any, h: jax.Array, w: dict[str, jax.Array]) -> Any:
    """(values, gradients of a weighted sum of them)."""

    def weighed(h, w):
        out = function(h, w)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    (_, out), gradients = jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True)(h, w)
    return out, gradients


def close(got: Any, want: Any, atol: float = 2e-6) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, atol=atol * max(1, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("case", ["normalized", "as they are", "ties", "all to one"])
def test_a_mixture_is_its_tokens_each_by_itself(case: str):
    w, h_TD = weights(), drawn(11, D, seed=9)
    experts = Experts(X, 2, F, normalized=case != "as they are")
    if case == "ties":  # the first of equals
        w["router"] = jnp.zeros((D, X))
    if case == "all to one":
        experts = Experts(X, 1, F, normalized=False)
        h_TD, w["router"] = jnp.abs(h_TD), jnp.zeros((D, X)).at[:, 3].set(0.1)
    got = both(jax.jit(lambda h, w: run(h[None], w, experts)[0]), h_TD, w)
    want = both(lambda h, w: truth(h, w, experts), h_TD, w)
    assert float(jnp.max(jnp.abs(want[1][0]))) > 1e-3
    close(got, want, 1e-5)


def test_a_row_is_the_same_whoever_else_is_there():
    w, h_TD = weights(), drawn(40, D, seed=9)
    every = jax.jit(run)(h_TD[None], w)[0]
    close(jax.jit(run)(h_TD[None, 7:9], w)[0], every[7:9])


@pytest.mark.parametrize(
    "sizes", [MeshConfig(model=2), MeshConfig(context=2, model=2, data=2), MeshConfig(context=2, fsdp=2)], ids=str
)
def test_a_mesh_says_what_one_device_says(sizes: MeshConfig):
    w, h_BTD = weights(), drawn(4, 32, D, seed=9)
    mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
    want = both(jax.jit(run), h_BTD, w)
    close(both(jax.jit(partial(run, mesh=mesh)), h_BTD, w), want, 1e-5)
    few = jax.jit(partial(run, mesh=mesh))(h_BTD[:1, :3], w)  # which no axis divides
    close(few, want[0][:1, :3])


def plainly(x_PD: jax.Array, sizes: tuple[int, ...], w_XDF: jax.Array) -> jax.Array:
    of_P = np.repeat(np.arange(X), sizes)
    return jnp.einsum("pd,pdf->pf", x_PD[: len(of_P)], w_XDF[of_P], precision="highest")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_products(sizes: tuple[int, ...]):
    """The loop with its gradients, and the kernels that a GPU has for the same, by interpreting them."""
    rows, columns = sum(sizes), 64
    w_XDF, sizes_X = drawn(X, D, columns, seed=3), jnp.asarray(sizes, jnp.int32)
    loop = Grouping("cpu", 16)
    x_PD, weigh_PF = drawn(64 + 16, D, seed=4), drawn(80, columns, seed=5)

    def product(x_PD, w_XDF):
        return grouped_product(x_PD, sizes_X, w_XDF, how=loop, dtype=jnp.float32)[:rows]

    def weighed(function):
        return lambda x, w: jnp.sum(function(x, w) * weigh_PF[:rows])

    want = plainly(x_PD, sizes, w_XDF)
    dx_PD, dw_XDF = jax.grad(weighed(lambda x, w: plainly(x, sizes, w)), (0, 1))(x_PD, w_XDF)
    close(product(x_PD, w_XDF), want)
    got = jax.grad(weighed(product), (0, 1))(x_PD, w_XDF)
    close((got[0][:rows], got[1]), (dx_PD[:rows], dw_XDF), 1e-5)
    tiles = tiles_of(sizes_X, 64, 16)
    kernel = partial(grouped_kernel.product, tiles=tiles, dtype=jnp.float32, interpret=True)
    close(kernel(x_PD, values=w_XDF)[:rows], want)
    turned = kernel(weigh_PF, values=w_XDF, turned=True)
    close(turned[:rows], dx_PD[:rows], 1e-5)
    outer = grouped_kernel.outer(x_PD, weigh_PF, sizes_X, tile=16, dtype=jnp.float32, interpret=True)
    close(outer, dw_XDF, 1e-5)


def test_megablox_takes_rows_that_no_expert_has():
    """What a TPU runs, interpreted: junk rows lie behind the last."""
    sizes = (3, 0, 40, 1, 0)
    w_XDF, how = drawn(X, D, 64, seed=3), Grouping("tpu", 16)
    x_PD = drawn(how.padded(44), D, seed=4)
    assert x_PD.shape[0] == 128
    got = gmm(x_PD, w_XDF, jnp.asarray(sizes, jnp.int32), jnp.float32, _megablox_tiling(w_XDF.shape), interpret=True)
    close(got[:44], plainly(x_PD, sizes, w_XDF), 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_in_few_bits(bits: WeightBits):
    """What restored matrices say, by the loop and by the GPU's kernel."""
    sizes, deep, columns = (3, 0, 40, 1, 0), 128, 64
    values, scale = jax.lax.map(lambda w: quantize_weights(w, bits), drawn(X, deep, columns, seed=3))
    whole_XFD = jnp.stack([dequantize(values[x], scale[x], bits) for x in range(X)])
    x_PD, sizes_X = drawn(80, deep, seed=4), jnp.asarray(sizes, jnp.int32)
    want = plainly(x_PD, sizes, whole_XFD.swapaxes(1, 2))
    how = Grouping("cpu", 16)
    got = grouped_product(x_PD, sizes_X, values, scale, how=how, bits=bits, dtype=jnp.float32)
    close(got[:44], want, 1e-5)
    kernel = partial(grouped_kernel.product, tiles=tiles_of(sizes_X, 64, 16), bits=bits, turned=True)
    close(kernel(x_PD, values=values, scale=scale, dtype=jnp.float32, interpret=True)[:44], want, 1e-5)


def test_only_the_experts_that_rows_touch_are_read():
    """NaN in the others reaches nothing."""
    w, h_TD = weights(), jnp.abs(drawn(6, D, seed=9))
    w["router"] = jnp.zeros((D, X)).at[:, 1].set(0.5).at[:, 3].set(0.4)
    for name in ("gate", "up", "down"):
        w[name] = w[name].at[jnp.asarray([0, 2, 4])].set(jnp.nan)
    out = run(h_TD[None], w)
    assert bool(jnp.all(jnp.isfinite(out)))


def test_the_loop_copies_one_expert_at_a_time():
    """Of eight wide experts no second copy lies anywhere, nor a part of them."""
    shapes = {"h": (1, 2, 128), "router": (128, 8), "gate": (8, 128, 256), "up": (8, 128, 256), "down": (8, 256, 128)}
    h, *w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values())
    experts = Experts(count=8, per_token=2, ffn=256, normalized=True)

    def mixed(h_BTD, router_DX, *matrices):
        return mixture(h_BTD, router_DX, *map(Grouped, matrices), experts=experts)

    memory = jax.jit(mixed).lower(h, *w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * 128 * 256


def test_shapes_are_checked_while_tracing():
    good: dict[str, Any] = {"x_PD": drawn(80, D), "sizes_X": jnp.zeros(X, jnp.int32), "values": drawn(X, D, F)}
    how: dict[str, Any] = {"how": Grouping("cpu", 16), "dtype": jnp.float32}
    for wrong in ({"sizes_X": jnp.zeros(X + 1, jnp.int32)}, {"values": drawn(X, D + 1, F)}, {"x_PD": drawn(8, D)}):
        with pytest.raises(ValueError, match="grouped_product: "):
            grouped_product(**good | wrong, **how)
    with pytest.raises(ValueError, match="grouped_outer: expected depths and widths of 32, got 32 and 24"):
        grouped_kernel.outer(drawn(80, D), drawn(80, F), good["sizes_X"], tile=16, dtype=jnp.float32)


def test_expected_experts():
    """Of two draws of 2 among 5: 2 + 2 * 3 / 5."""
    assert EXPERTS.touched(1) == pytest.approx(2) and EXPERTS.touched(2) == pytest.approx(3.2)
    assert EXPERTS.touched(0) == 0
