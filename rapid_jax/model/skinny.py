# SPDX-License-Identifier: Apache-2.0
"""A few rows times a large matrix of 8 or 4 bit weights on NVIDIA GPUs, in Pallas (Triton): every weight is read once.

Decoding multiplies a row or some with every weight of a model, and the time is that of reading the weights. To convert
them to bfloat16 would take longer than to read them, so the rows come to the weights: as fixed-point numbers of 15 bits
(`FixedPoint`), whose two halves are two int8 rows of the same matrix product. Sums are exact integers, over all of the
depth for 8 bits, over a group for 4.
"""

import math
from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rapid_jax.model.families import Activation
from rapid_jax.runtime.contract import contract

MOST_ROWS = 8  # their high and low halves fill the 16 rows of a matrix unit
GROUP = 128  # weights of a column that share a scale, in 4 bits
STEPS = 127 * 128  # of the largest element of a row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FixedPoint:
    """Rows x[t] = (128 high[t] + low[t]) scale[t]: 16,256 steps to each row's largest element."""

    halves_PD: jax.Array  # int8 [16, D]: high halves from row 0 on, low ones from row 8 on; the others are junk
    scale_T: jax.Array  # float32


@dataclass(frozen=True)
class Tile:
    """How the matrix is cut; by measurement (tests/benchmarks/NOTES.md)."""

    deep: int  # weights of a column at a time
    wide: int  # columns of a program
    warps: int
    stages: int  # tiles under way
    programs: int  # at the least, where there is depth enough to share out


def tile_of(bits: int, depth: int, gated: bool) -> Tile:
    """For weights of so many bits."""
    if bits == 8:
        return Tile(256, 64, 4, 3, 256)
    return Tile(512, 64, 4, 3, 256) if gated else Tile(256, 64, 4, 4, 500 if depth > 8192 else 256)


def fits(rows: int, depth: int, width: int) -> bool:
    """Whether the kernels take `rows` rows times a [depth, width] matrix."""
    return 1 <= rows <= MOST_ROWS and depth % GROUP == 0 and width % 32 == 0


def fixed_point(
    x_TD: jax.Array,
    *,
    parts_STD: jax.Array | None = None,
    norm_D: jax.Array | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    interpret: bool = False,
) -> tuple[FixedPoint, jax.Array]:
    """(x as fixed-point rows, x), by one program a row.

    `parts_STD` are float32 addends of x, what a matrix product left in several; the sum comes back in x's dtype. With
    `norm_D` the rows are the RMS norm of that sum times `norm_D` plus `offset`. Raises ValueError, while tracing, for
    other shapes.
    """
    with contract("fixed_point"):
        chex.assert_rank(x_TD, 2)
        T, D = x_TD.shape
        assert 1 <= T <= MOST_ROWS, f"expected 1 to {MOST_ROWS} rows, got {T}"
        chex.assert_shape([] if parts_STD is None else [parts_STD], (None, T, D))
        chex.assert_type([] if parts_STD is None else [parts_STD], jnp.float32)
        chex.assert_shape([] if norm_D is None else [norm_D], (D,))
        chex.assert_type([x_TD] if norm_D is None else [x_TD, norm_D], float)
    lanes = pl.next_power_of_2(D)
    row = pl.BlockSpec((None, lanes), lambda t: (t, 0))
    given = [(x_TD, row)]
    shares = 0 if parts_STD is None else parts_STD.shape[0]
    if parts_STD is not None:
        given.append((parts_STD, pl.BlockSpec((shares, None, lanes), lambda t: (0, t, 0))))
    if norm_D is not None:
        given.append((norm_D, pl.BlockSpec((lanes,), lambda t: (0,))))
    halves_PD, scale_T, sum_TD = pl.pallas_call(
        partial(_fixed_point_kernel, width=D, shares=shares, normed=norm_D is not None, eps=eps, offset=offset),
        grid=(T,),
        in_specs=[spec for _, spec in given],
        out_specs=[
            pl.BlockSpec((2 * MOST_ROWS, lanes), lambda t: (0, 0)),
            pl.BlockSpec((None,), lambda t: (t,)),
            row,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((2 * MOST_ROWS, D), jnp.int8),
            jax.ShapeDtypeStruct((T,), jnp.float32),
            jax.ShapeDtypeStruct((T, D), x_TD.dtype),
        ],
        compiler_params=triton.CompilerParams(num_warps=32 if lanes > 4096 else 16, num_stages=1),
        interpret=interpret,
        name="fixed_point",
    )(*(array for array, _ in given))
    return FixedPoint(halves_PD, scale_T), x_TD if parts_STD is None else sum_TD


def _fixed_point_kernel(x_ref, *refs, width, shares, normed, eps, offset):
    *refs, halves_ref, scale_ref, sum_ref = refs
    inside = jnp.arange(x_ref.shape[0]) < width

    def load(ref, *index):
        at = ref.at[(*(jnp.int32(i) for i in index), slice(None))]
        return triton.load(at, mask=inside, other=0).astype(jnp.float32)

    y = load(x_ref)
    if shares:
        y = sum((load(refs[0], share) for share in range(shares)), y).astype(sum_ref.dtype)
        triton.store(sum_ref.at[:], y, mask=inside)
        y = y.astype(jnp.float32)
    if normed:
        y *= lax.rsqrt(jnp.sum(y * y) / width + eps) * (load(refs[-1]) + offset)
    largest = jnp.max(jnp.abs(y))
    steps = y * jnp.where(largest > 0, STEPS / largest, 0.0)
    steps = (steps + jnp.where(steps >= 0, 0.5, -0.5)).astype(jnp.int32)
    high = lax.shift_right_arithmetic(steps + 64, jnp.int32(7))
    row = pl.program_id(0)
    for half, at in ((high, row), (steps - high * 128, row + MOST_ROWS)):
        triton.store(halves_ref.at[at, :], half.astype(jnp.int8), mask=inside)
    scale_ref[...] = largest / STEPS


def skinny_matmul(
    x: FixedPoint,
    weight: jax.Array,
    scale: jax.Array,
    *,
    bits: int,
    gated: jnp.dtype | None = None,
    activation: Activation = "silu",
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """float32 [S, T, N], whose sum over S is the rows times a matrix of N columns; S is chosen to fill the device.

    With `gated` the columns are [gate, up], and activation(gate) up comes back, [T, N / 2] of that dtype.

    bits 8: `weight` is int8 [N, D], `scale` float32 [N]. 4: int8 [N, D / 2], each of which holds two weights of a group
    of `GROUP`: of the group's first half in the low four bits, of its second half in the high ones, in two's
    complement; `scale` is float32 [D / GROUP, N]. Raises ValueError, while tracing, for other shapes.
    """
    with contract("skinny_matmul"):
        assert bits in (4, 8), f"expected 4 or 8 bits, got {bits}"
        chex.assert_rank([x.halves_PD, x.scale_T, weight], [2, 1, 2])
        T, (N, stored), D = x.scale_T.shape[0], weight.shape, x.halves_PD.shape[1]
        assert fits(T, D, N), f"expected 1 to {MOST_ROWS} rows, depths of {GROUP} and widths of 32, got {T} x {D} x {N}"
        chex.assert_shape(
            [x.halves_PD, weight, scale],
            [(2 * MOST_ROWS, D), (N, D * bits // 8), (N,) if bits == 8 else (D // GROUP, N)],
        )
        chex.assert_type([x.halves_PD, weight, x.scale_T, scale], [jnp.int8, jnp.int8, jnp.float32, jnp.float32])
    tile = tile or tile_of(bits, D, gated is not None)
    ins, columns = (1, N) if gated is None else (2, N // 2)
    wide, deep = math.gcd(tile.wide // ins, columns), math.gcd(tile.deep, D)
    tiles = D // deep
    enough = (n for n in range(1, tiles + 1) if tiles % n == 0 and n * (columns // wide) >= tile.programs)
    shares = next(enough, tiles) if gated is None else 1
    out_shape = jax.ShapeDtypeStruct((shares, T, columns), jnp.float32 if gated is None else gated)
    weights = []
    for index in range(ins):  # the gate's columns, those of up
        first = index * (columns // wide)
        weights.append((weight, pl.BlockSpec((wide, stored), lambda n, j, first=first: (first + n, 0))))
        if bits == 8:
            weights.append((scale, pl.BlockSpec((wide,), lambda n, j, first=first: (first + n,))))
        else:
            weights.append((scale, pl.BlockSpec((D // GROUP, wide), lambda n, j, first=first: (0, first + n))))
    sizes = {"rows": T, "deep": deep, "count": tiles // shares}
    out = pl.pallas_call(
        partial(_matmul_kernel, **sizes, bits=bits, activation=activation, packed=not interpret),
        grid=(columns // wide, shares),
        in_specs=[
            pl.BlockSpec((2 * MOST_ROWS, D), lambda n, j: (0, 0)),
            pl.BlockSpec((T,), lambda n, j: (0,)),
            *(spec for _, spec in weights),
        ],
        out_specs=pl.BlockSpec((None, T, wide), lambda n, j: (j, 0, n)),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"skinny_matmul_{bits}{'' if gated is None else '_gated'}",
    )(x.halves_PD, x.scale_T, *(array for array, _ in weights))
    return out if gated is None else out[0]


def _matmul_kernel(x_ref, x_scale_ref, *refs, rows, deep, count, bits, activation, packed):
    *weights, out_ref = refs
    pairs = list(zip(weights[::2], weights[1::2], strict=True))  # one, or those of gate and up
    wide, share = out_ref.shape[1], pl.program_id(1)
    rows_P = jnp.arange(2 * MOST_ROWS)
    real = (rows_P % MOST_ROWS < rows)[:, None]

    def x_part(start, size):
        return triton.load(x_ref.at[:, pl.ds(start, size)], mask=real, other=0)

    def add(index, sums):
        at = share * count + index
        one = _eight if bits == 8 else partial(_four, packed=packed)
        return tuple(one(x_part, at, deep, *pair, acc) for pair, acc in zip(pairs, sums, strict=True))

    kind = jnp.int32 if bits == 8 else jnp.float32
    sums = lax.fori_loop(0, count, add, (jnp.zeros((2 * MOST_ROWS, wide), kind),) * len(pairs))
    sums = [acc.astype(jnp.float32) for acc in sums]
    if bits == 8:
        sums = [acc * scale_ref[...][None, :] for acc, (_, scale_ref) in zip(sums, pairs, strict=True)]
    for row in range(rows):
        parts_P = jnp.where(rows_P == row, 128.0, jnp.where(rows_P == row + MOST_ROWS, 1.0, 0.0))
        parts_P *= x_scale_ref[row] / (1 if bits == 8 else 16)
        outs = [jnp.sum(acc * parts_P[:, None], axis=0) for acc in sums]
        if len(outs) == 2:
            gate, up = (out.astype(out_ref.dtype).astype(jnp.float32) for out in outs)
            outs = [gate * jax.nn.sigmoid(_exponent(gate, activation)) * up]
        out_ref[row, :] = outs[0].astype(out_ref.dtype)


def _exponent(gate: jax.Array, activation: Activation) -> jax.Array:
    """What silu and gelu (its tanh form: tanh is a sigmoid of twice its argument) are the gate times the sigmoid of."""
    if activation == "silu":
        return gate
    return 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)


def _eight(x_part, tile, deep, w_ref, scale_ref, acc):
    """The sums with a tile more: `deep` weights of every column."""
    return acc + _product(x_part(tile * deep, deep), w_ref[:, pl.ds(tile * deep, deep)])


def _four(x_part, tile, deep, w_ref, scale_ref, acc, *, packed):
    """The same for 4 bits; 16 times the sums. Places are products, no quotients: Triton must see how they align."""
    half = GROUP // 2
    for part in range(deep // GROUP):
        group = tile * (deep // GROUP) + part
        w = w_ref[:, pl.ds(group * half, half)]
        low, high = _low(w, packed), w & jnp.int8(-16)
        product = _product(x_part(group * GROUP, half), low) + _product(x_part(group * GROUP + half, half), high)
        acc += product.astype(jnp.float32) * scale_ref[group, :][None, :]
    return acc


def _low(w: jax.Array, packed: bool) -> jax.Array:
    """16 times the low half of every byte; `packed`: four bytes by one instruction, which Pallas cannot interpret."""
    if not packed:
        return w << jnp.int8(4)
    shift = "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0;}"
    shape = [jax.ShapeDtypeStruct(w.shape, jnp.int8)]
    return triton.elementwise_inline_asm(shift, args=[w], constraints="=r,r", pack=4, result_shape_dtypes=shape)[0]


def _product(x_PD: jax.Array, w_ND: jax.Array) -> jax.Array:
    return lax.dot_general(x_PD, w_ND, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
