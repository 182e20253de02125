# SPDX-License-Identifier: Apache-2.0
"""A matrix of a model as it lies in memory: in full or in few bits, on one device or split over those of a mesh."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.einsum32 import einsum32
from rapid_jax.model.quantized import WeightBits, product, quantize_weights
from rapid_jax.runtime.axes import MeshAxes

Split: TypeAlias = Literal["columns", "depth"]  # what of a matrix is split over the mesh's axis `model`
MODEL = "model"


@dataclass(frozen=True)
class Place:
    """How a matrix [D, J] lies on a mesh; without one it is on one device."""

    mesh: Mesh | None = None
    split: Split = "columns"
    other: MeshAxes = None  # what the axis that `model` does not split is split over

    @property
    def parts(self) -> int:
        """Devices along `model`."""
        return 1 if self.mesh is None else self.mesh.shape[MODEL]

    @property
    def spec(self) -> tuple[MeshAxes, MeshAxes]:
        """Of the axes (D, J)."""
        return (self.other, MODEL) if self.split == "columns" else (MODEL, self.other)

    def sharding(self, *axes: MeshAxes) -> NamedSharding | None:
        """Of an array whose axes lie so."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def per_device(self, function: Any, given: tuple[PartitionSpec, ...], result: Any) -> Any:
        """`function` of what each device along `model` has; how the mesh's other axes split arrays is left alone."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, axis_names={MODEL}, in_specs=given, out_specs=result, check_vma=False
        )


class Matrix(nnx.Module):
    """[D, J], or with a leading layer axis one for every layer; called with x [B, T, D] it gives [B, T, J].

    In full `values` are [D, J]. In few bits they are what `quantize_weights` gives, [J, D] or half of it, with `scale`.
    """

    def __init__(self, values: Any, scale: Any = None, *, place: Place, bits: WeightBits | None = None):
        self.values, self.scale = nnx.Param(values), None if scale is None else nnx.Param(scale)
        self.place = place
        self.bits: WeightBits | None = bits

    @property
    def columns(self) -> int:
        """J."""
        return self.values.shape[-1 if self.bits is None else -2]

    def __call__(self, x_BTD: jax.Array, dtype: Any = None) -> jax.Array:
        """Summed in float32 on a device, in `dtype` or else x's. Sums over devices are `sum_over_model`."""
        dtype = dtype or x_BTD.dtype
        if self.bits is None:
            return times(x_BTD, self.values[...], "DJ").astype(dtype)
        assert self.scale is not None
        bits, split, mesh, parts = self.bits, self.place.split, self.place.mesh, self.place.parts

        def local(x_BTD: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
            out_BTJ = product(x_BTD, values, scale, bits)
            if split == "columns" or parts == 1:  # XLA refuses a sum over an axis of one device
                return out_BTJ.astype(dtype)
            return sum_over_model(out_BTJ, dtype, mesh)

        along = PartitionSpec(None, None, MODEL)
        x, result = (PartitionSpec(), along) if split == "columns" else (along, PartitionSpec())
        given = x, *(PartitionSpec(*axes) for axes in _axes_in_bits(*replace(self.place, other=None).spec, bits))
        return self.place.per_device(local, given, result)(x_BTD, self.values[...], self.scale[...])

    def in_bits(self, bits: WeightBits) -> "Matrix":
        """Its copy in so many bits."""
        return in_bits(self.values.get_value(), "DJ", bits, self.place)


def sum_over_model(x: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """Inside shard_map, the sum of all devices' along `model`, in that dtype: in float32 on CPUs, which cannot add
    bfloat16.
    """
    return lax.psum(x.astype(jnp.float32 if platform_of(mesh) == "cpu" else dtype), MODEL).astype(dtype)


def times(x_BTD: jax.Array, weight: jax.Array, axes: str) -> jax.Array:
    """x times a matrix whose axes are DJ or JD, float32 [B, T, J]; float32 weights are multiplied in full float32.

    A row alone comes as eight on GPUs and TPUs. With one XLA reads the weights 1.15 times as slowly on a GPU; on a TPU
    it does without the matrix unit, 2.5 times as slowly on v5p and 12 times on v6e by its compiler's own model.
    """
    by_rows = partial(einsum32, f"BTD,{axes}->BTJ")
    if x_BTD.shape[0] * x_BTD.shape[1] > 1:
        return by_rows(x_BTD, weight)

    def as_eight(x_BTD: jax.Array, weight: jax.Array) -> jax.Array:
        return by_rows(jnp.broadcast_to(x_BTD, (1, 8, x_BTD.shape[2])), weight)[:, :1]

    return lax.platform_dependent(x_BTD, weight, cpu=by_rows, default=as_eight)


def in_bits(weight: Any, axes: str, bits: WeightBits, place: Place) -> Matrix:
    """The matrix whose array has the axes DJ or JD, or those of every layer, in few bits. The array stays as it is."""
    stack = (None,) * (weight.ndim - 2)
    shardings = tuple(place.sharding(*stack, *axes) for axes in _axes_in_bits(*place.spec, bits))
    values, scale = made(partial(quantize_matrix, axes=axes, bits=bits, place=place), shardings, weight)
    return Matrix(values, scale, place=place, bits=bits)


def _axes_in_bits(D: MeshAxes, J: MeshAxes, bits: WeightBits) -> tuple[tuple[MeshAxes, ...], tuple[MeshAxes, ...]]:
    """What the axes of values and of scales are split over, where those of the matrix [D, J] are so."""
    return (J, D), (J,) if bits == 8 else (D, J)


def made(function: Any, shardings: Any, *arrays: Any) -> Any:
    """What a program makes of arrays, lying so; of shapes in the place of arrays the shapes."""
    if not any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        found = function(*arrays)
        return jax.tree.map(lambda x, to: x if to is None else jax.device_put(x, to), found, shardings)
    shapes = jax.eval_shape(function, *arrays)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


@partial(jax.jit, static_argnames=("axes", "bits", "place"))
def quantize_matrix(weight: jax.Array, axes: str, bits: WeightBits, place: Place) -> tuple[jax.Array, jax.Array]:
    """(values, scales) of a matrix, or of every layer's, whose array has the axes DJ or JD."""

    def local(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        over = MODEL if place.split == "depth" and place.parts > 1 else None

        def one(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
            return quantize_weights(matrix if axes == "DJ" else matrix.T, bits, over)

        def each(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            return one(weight) if weight.ndim == 2 else lax.map(each, weight)  # a layer or expert at a time in float32

        return each(weight)

    stack = (None,) * (weight.ndim - 2)
    own = replace(place, other=None).spec  # of `model` alone
    given = PartitionSpec(*stack, *(own if axes == "DJ" else own[::-1]))
    result = tuple(PartitionSpec(*stack, *axes) for axes in _axes_in_bits(*own, bits))
    return place.per_device(local, (given,), result)(weight)
