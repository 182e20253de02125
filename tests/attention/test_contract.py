# SPDX-License-Identifier: Apache-2.0
"""What does not go together is refused while a kernel is traced, by every kernel and in one way."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rapid_jax.attention.cudnn import Cudnn
from rapid_jax.attention.flash_decode import flash_decode, flash_decoded
from rapid_jax.attention.kernels import Cotangent
from rapid_jax.attention.online_softmax import Rows, Slots
from rapid_jax.attention.splash import Splash
from rapid_jax.attention.tpu_decode import Stack, tpu_decode
from rapid_jax.attention.xla import Xla

B, K, R, S, H = 2, 2, 128, 512, 64
FLOATS = {"q_BKRH", "k_BKSH", "v_BKSH"}


def rows_and_slots(batch: int = B, slots_batch: int = B, rows: int = R) -> tuple[Rows, Slots]:
    """Shapes alone: nothing here is computed."""

    def array(*shape: int, dtype=jnp.float32) -> Any:  # which cuDNN leaves to XLA: there is none on a CPU
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = array(slots_batch, K, S, H)
    return (
        Rows(array(batch, K, rows, H), array(batch, rows, dtype=jnp.int32)),
        Slots(keys, keys, array(slots_batch, S, dtype=jnp.int32)),
    )


def cotangent_of(rows: Rows) -> Cotangent:
    flat = jax.ShapeDtypeStruct(rows.q_BKRH.shape[:-1], jnp.float32)
    return Cotangent(rows.q_BKRH, rows.q_BKRH, flat, flat)  # type: ignore[arg-type]


def trace(function: Callable, *args: Any) -> None:
    jax.eval_shape(function, *args)


COUNT = jax.ShapeDtypeStruct((), jnp.int32)
ONE_OF = {  # kernel -> (what is traced, of rows and slots, whether it takes one sequence under many)
    "flash_decode": (lambda r, s: flash_decode(r, (s,), (jnp.int32(3),), scale=1.0, interpret=True), True),
    "flash_decode, finished": (lambda r, s: flash_decoded(r, (s, s), (jnp.int32(3),) * 2, scale=1.0), True),
    "cudnn": (partial(Cudnn(64).forward, scale=1.0), False),
    "splash": (partial(Splash(64, interpret=True).forward, scale=1.0), False),
    "xla": (partial(Xla(64).forward, scale=1.0), False),
}


def changed(array: Any, **fields: Any) -> Any:
    return jax.ShapeDtypeStruct(fields.get("shape", array.shape), fields.get("dtype", array.dtype))


def wrong() -> dict[str, Callable[[Rows, Slots], tuple[Rows, Slots]]]:
    """One thing wrong in each, by name."""
    found: dict[str, Callable] = {}
    for side, names in ((0, ("q_BKRH", "pos_BR")), (1, ("k_BKSH", "v_BKSH", "pos_BS"))):
        for name in names:
            for axis in range(4 if name in FLOATS else 2):

                def shorter(*given, side=side, name=name, axis=axis):
                    array = getattr(given[side], name)
                    shape = tuple(size + (at == axis) for at, size in enumerate(array.shape))
                    return tuple(
                        replace(x, **{name: changed(array, shape=shape)}) if at == side else x
                        for at, x in enumerate(given)
                    )

                found[f"{name}, axis {axis}"] = shorter
            dtype = jnp.int32 if name in FLOATS else jnp.int8

            def retyped(*given, side=side, name=name, dtype=dtype):
                array = changed(getattr(given[side], name), dtype=dtype)
                return tuple(replace(x, **{name: array}) if at == side else x for at, x in enumerate(given))

            found[f"{name}, dtype"] = retyped
    found["scales without int8"] = lambda rows, slots: (
        rows,
        replace(slots, k_scale_BKS=changed(slots.k_BKSH, shape=(B, K, S), dtype=jnp.float32)),
    )
    found["first positions of other rows"] = lambda rows, slots: (
        replace(rows, first_BR=changed(rows.pos_BR, shape=(B, R + 1))),
        slots,
    )
    found["slots of three sequences under two"] = lambda rows, slots: (rows, rows_and_slots(3, 3)[1])
    return found


WRONG = wrong()


@pytest.mark.parametrize("kernel", ONE_OF)
def test_one_thing_wrong_is_refused(kernel):
    function, _ = ONE_OF[kernel]
    if kernel != "flash_decode, finished":  # on a CPU it could not be traced to its end
        trace(function, *rows_and_slots())
    for change in WRONG.values():
        with pytest.raises(ValueError, match=rf"^{kernel.split(',')[0]}: .*(expected|Error in)"):
            trace(function, *change(*rows_and_slots()))


@pytest.mark.parametrize("kernel", ONE_OF)
def test_one_sequence_s_slots_under_many_are_understood_or_refused(kernel):
    function, shared = ONE_OF[kernel]
    if not shared:
        with pytest.raises(ValueError, match=f"^{kernel}: expected slots of 4 sequences as the rows, got 1"):
            trace(function, *rows_and_slots(4, 1))
    elif kernel == "flash_decode":
        out = jax.eval_shape(function, *rows_and_slots(4, 1))
        assert out.out_BKRH.shape == (4, K, R, H)


@pytest.mark.parametrize("kernel", ["cudnn", "splash", "xla"])
@pytest.mark.parametrize("field", ["out_BKRH", "d_out_BKRH", "delta_BKR", "log_sum_BKR"])
def test_a_cotangent_of_other_rows_is_refused(kernel, field):
    backward = partial(ONE_OF[kernel][0].func.__self__.backward, scale=1.0)
    rows, slots = rows_and_slots()
    trace(backward, rows, slots, cotangent_of(rows))
    other = replace(cotangent_of(rows), **{field: getattr(cotangent_of(rows_and_slots(rows=64)[0]), field)})
    with pytest.raises(ValueError, match=f"^{kernel}: Error in shape"):
        trace(backward, rows, slots, other)


def stack(slots: Slots, layers: int = 3) -> Stack:
    every = replace(
        slots,
        k_BKSH=changed(slots.k_BKSH, shape=(layers, *slots.k_BKSH.shape)),
        v_BKSH=changed(slots.v_BKSH, shape=(layers, *slots.v_BKSH.shape)),
    )
    return Stack(every, COUNT)  # type: ignore[arg-type]


def over(rows: Rows, far: Slots, *, stacked: bool, tail: Slots, new: int | None = None, used: Any = COUNT) -> None:
    """Traces the kernel for TPUs over a prefix, a tail and perhaps so many new tokens."""
    sides: tuple[Any, ...] = (stack(far), stack(tail)) if stacked else (far, tail)
    if new is not None:
        keys = changed(tail.k_BKSH, shape=(*tail.k_BKSH.shape[:2], new, H))
        sides += (Slots(keys, keys, changed(tail.pos_BS, shape=(tail.pos_BS.shape[0], new))),)
    trace(partial(tpu_decode, scale=1.0, interpret=True), rows, sides, (used, *[COUNT] * (len(sides) - 1)))


@pytest.mark.parametrize("stacked", [False, True])
def test_tpu_decode(stacked):
    for batch, sequences in ((1, 1), (4, 1), (4, 2), (2, 2)):
        rows, far = rows_and_slots(batch, sequences)
        over(rows, far, stacked=stacked, tail=rows_and_slots(batch, batch)[1])
        over(rows, far, stacked=stacked, tail=rows_and_slots(batch, batch)[1], new=R)
        over(rows, far, stacked=stacked, tail=far if sequences == batch else rows_and_slots(batch, batch)[1])
    rows, slots = rows_and_slots()
    for change in WRONG.values():
        other_rows, other_slots = change(rows, slots)
        for far, tail in ((other_slots, slots), (slots, other_slots)):
            with pytest.raises(ValueError, match=r"^tpu_decode: .*(expected|Error in)"):
                over(other_rows, far, stacked=stacked, tail=tail)
    four = rows_and_slots(4, 4)
    for refused, why in (
        (lambda: over(four[0], slots, stacked=stacked, tail=slots), "expected slots of 4 sequences as the rows, got 2"),
        (lambda: over(rows, slots, stacked=stacked, tail=slots, new=3), "expected the 128 tokens"),
        (lambda: over(*rows_and_slots(rows=300), stacked=stacked, tail=slots), "expected slots in whole blocks"),
        (lambda: over(rows, slots, stacked=stacked, tail=slots, used=changed(COUNT, shape=(3,))), "expected 1 or 2"),
        (lambda: over(rows, slots, stacked=stacked, tail=slots, used=changed(COUNT, dtype=jnp.float32)), "Error in"),
    ):
        with pytest.raises(ValueError, match=f"^tpu_decode: {why}"):
            refused()


def test_layers_and_sides_of_the_kernel_for_tpus():
    rows, slots = rows_and_slots()
    function = partial(tpu_decode, scale=1.0, interpret=True)
    every = stack(slots)
    uneven = Stack(replace(every.every, v_BKSH=stack(slots, 4).every.v_BKSH), every.layer)
    layers = Stack(every.every, changed(COUNT, shape=(1,)))  # type: ignore[arg-type]
    for sides in ((uneven, slots), (slots, uneven), (layers, slots), (slots,), (slots,) * 4, (slots, slots, every)):
        with pytest.raises(ValueError, match=r"^tpu_decode: (expected|Error in)"):
            trace(function, rows, sides, (COUNT,) * len(sides))
    with pytest.raises(ValueError, match=r"^tpu_decode: expected 2 counts"):
        trace(function, rows, (slots, slots), (COUNT,))


def test_numbers_of_sets_and_of_used_slots():
    rows, slots = rows_and_slots()
    for sides, used in (((), ()), ((slots,) * 3, (COUNT,) * 3), ((slots,), (COUNT, COUNT))):
        with pytest.raises(ValueError, match=r"^flash_decode: expected"):
            jax.eval_shape(partial(flash_decode, scale=1.0, interpret=True), rows, sides, used)
    for count in (changed(COUNT, shape=(1,)), changed(COUNT, dtype=jnp.float32)):
        with pytest.raises(ValueError, match=r"^flash_decode: Error in"):
            jax.eval_shape(partial(flash_decode, scale=1.0, interpret=True), rows, (slots,), (count,))
