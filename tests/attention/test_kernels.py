# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the platform against dense attention in float64: what they attend, and the gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import InterpretParams

from rapid_jax.attention import cudnn, splash, splash_plan
from rapid_jax.attention.kernels import Cotangent, Kernel, kernel_of, platform_of
from rapid_jax.attention.online_softmax import (
    Rows,
    Slots,
    finish,
    fold,
    log_sum,
    merge,
    pad_rows,
    pad_slots,
    unfold,
)
from rapid_jax.runtime.errors import InputError
from tests.reference import dense_attention, dense_gradients, visible

PLATFORM = platform_of(None)
KERNELS = {"cpu": ("xla", "splash"), "tpu": ("xla", "splash"), "gpu": ("xla", "cudnn")}[PLATFORM]
BLOCK = 96  # of xla; splash chooses 128 at these sizes
INTERPRETED = InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


@dataclass(frozen=True, eq=False)  # compared by identity: a case is a static argument
class Case:
    """Positions and tags of queries and slots, [B, T] and [B, S]; `parts` is how many pieces the slots come in."""

    q_pos: np.ndarray
    kv_pos: np.ndarray
    heads: tuple[int, int] = (2, 1)
    runs: int = 0
    parts: int = 1
    q_branch: np.ndarray | None = None
    kv_branch: np.ndarray | None = None
    used: int | None = None
    window: int | None = None

    @property
    def seen_BTS(self) -> np.ndarray:
        return visible(self.q_pos, self.kv_pos, self.q_branch, self.kv_branch, window=self.window)

    def rows(self, q_BTNH: jax.Array) -> Rows:
        branch = None if self.q_branch is None else jnp.asarray(self.q_branch)
        first = None if self.window is None else jnp.asarray(self.q_pos - self.window + 1)
        return fold(q_BTNH, jnp.asarray(self.q_pos), self.heads[1], branch, first, self.window)

    def slots(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> list[Slots]:
        kv = [jnp.split(x.swapaxes(1, 2), self.parts, axis=2) for x in (k_BSKH, v_BSKH)]
        tables = [self.kv_pos] if self.kv_branch is None else [self.kv_pos, self.kv_branch]
        return [Slots(*part) for part in zip(*kv, *(jnp.split(x, self.parts, axis=1) for x in tables), strict=True)]


def span(*pieces: tuple[int, int] | int, batch: int = 1) -> np.ndarray:
    """Ascending pieces (from, to), and as many empty places as a number says."""
    made = [np.full(piece, -1) if isinstance(piece, int) else np.arange(*piece) for piece in pieces]
    return np.tile(np.concatenate(made).astype(np.int32), (batch, 1))


def tags(*pieces: tuple[int, int]) -> np.ndarray:
    """(tag, how many) in order."""
    return np.concatenate([np.full(count, tag, np.int32) for tag, count in pieces])[None]


def cases() -> dict[str, Case]:
    rng = np.random.default_rng(5)
    early, late = span((0, 192), (1344, 1536)), span((192, 384), (1152, 1344))
    pair, alone = span((0, 200), 56, (200, 300), 28, (200, 320), 136), span((0, 250), (250, 320), (250, 330))
    pair_tags, alone_tags = tags((0, 256), (1, 128), (2, 256)), tags((0, 250), (1, 70), (2, 80))
    shuffled = span((0, 300), batch=2)
    shuffled = rng.permuted(np.where(rng.random(shuffled.shape) < 0.2, -1, shuffled), axis=1)
    queries = rng.integers(-1, 300, (2, 140)).astype(np.int32)
    uneven = np.concatenate([span((0, 300)), span((0, 190), 110), span(300)])
    return {
        "causal": Case(span((0, 384)), span((0, 384)), (4, 2), runs=1),
        "nothing promised, causal": Case(span((0, 256)), span((0, 256))),
        "unsorted, rows and slots missing": Case(queries, shuffled, (3, 3), parts=2),
        "sequences of uneven lengths": Case(uneven, uneven, (2, 2), runs=1),
        "chunk on a prefix": Case(span((300, 450)), span((0, 300), 212), (6, 2), runs=1, used=300),
        "zigzag, own": Case(early, early, runs=2),
        "zigzag, of an earlier device": Case(late, early, runs=2),
        "zigzag, of a later device": Case(early, late, runs=2),
        "zigzag, of a sequence that ends early": Case(late, span((0, 150), 234), runs=2),
        "nothing seen": Case(span((0, 200)), span((200, 400)), runs=1),
        "branches in blocks of their own": Case(pair, pair, q_branch=pair_tags, kv_branch=pair_tags),
        "branches anywhere": Case(alone, alone, q_branch=alone_tags, kv_branch=alone_tags),
        "window of xla's block, causal": Case(span((0, 384)), span((0, 384)), (4, 2), runs=1, window=96),
        "window of 1, lengths uneven": Case(uneven, uneven, (2, 2), runs=1, window=1),
        "window of 130, chunk on a prefix": Case(span((300, 450)), span((0, 300), 212), runs=1, used=300, window=130),
        "window of splash's block, zigzag, own": Case(early, early, runs=2, window=128),
        "window of 100, zigzag, earlier device": Case(late, early, runs=2, window=100),
        "window of 50, unsorted": Case(queries, shuffled, (3, 3), parts=2, window=50),
        "window of 60, branches": Case(alone, alone, q_branch=alone_tags, kv_branch=alone_tags, window=60),
    }


CASES = cases()
ROUNDED = ("zigzag, own", "zigzag, of a later device")


@dataclass(frozen=True)
class Numbers:
    out_BTNH: np.ndarray
    dq_BTNH: np.ndarray
    dk_BSKH: np.ndarray
    dv_BSKH: np.ndarray


def arrays_of(case: Case, dtype, H: int = 64) -> list[jax.Array]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(case.q_pos.size)
    (B, T), S, (N, K) = case.q_pos.shape, case.kv_pos.shape[1], case.heads
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jnp.asarray(size * rng.normal(size=shape), dtype) for size, shape in zip((2, 1, 1, 1), shapes, strict=True)]


def truth(case: Case, arrays: list[jax.Array]) -> Numbers:
    q, k, v, d_out = (np.asarray(x, np.float64) for x in arrays)
    return Numbers(dense_attention(q, k, v, case.seen_BTS), *dense_gradients(q, k, v, case.seen_BTS, d_out))


@partial(jax.jit, static_argnames=("kernel", "case"))
def _attended(q_BTNH, k_BSKH, v_BSKH, d_out_BTNH, *, kernel: Kernel, case: Case):
    """Forward over the parts, merged; backward over the parts, given what the merged result says."""
    options, scale = {"runs": case.runs}, q_BTNH.shape[-1] ** -0.5
    rows, slots = case.rows(q_BTNH), case.slots(k_BSKH, v_BSKH)
    used = None if case.used is None else jnp.int32(case.used)
    total = reduce(merge, [kernel.forward(rows, part, scale=scale, used=used, **options) for part in slots])
    out_BKRH = finish(total, jnp.float32)
    d_out_BKRH = fold(d_out_BTNH, rows.pos_BR[:, :: rows.group], k_BSKH.shape[2]).q_BKRH
    delta_BKR = jnp.sum(out_BKRH * d_out_BKRH.astype(jnp.float32), axis=-1)
    cotangent = Cotangent(out_BKRH.astype(q_BTNH.dtype), d_out_BKRH, delta_BKR, log_sum(total))
    dq, dk, dv = zip(*(kernel.backward(rows, part, cotangent, scale=scale, **options) for part in slots), strict=True)
    time = q_BTNH.shape[1]
    dk, dv = (jnp.concatenate(x, axis=2).swapaxes(1, 2) for x in (dk, dv))
    return unfold(out_BKRH, time), unfold(sum(dq), time), dk, dv


def attended(name: str, case: Case, arrays: list[jax.Array]) -> Numbers:
    kernel = kernel_of(name, PLATFORM, BLOCK)  # type: ignore[arg-type]
    if name == "splash" and PLATFORM == "cpu":
        kernel = replace(kernel, interpret=INTERPRETED)
    return Numbers(*map(np.asarray, _attended(*arrays, kernel=kernel, case=case)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients_are_dense_attention_s(name, case):
    arrays = arrays_of(CASES[case], jnp.float32)
    expected, got = truth(CASES[case], arrays), attended(name, CASES[case], arrays)
    np.testing.assert_allclose(got.out_BTNH, expected.out_BTNH, atol=1e-5, rtol=0)
    for field in ("dq_BTNH", "dk_BSKH", "dv_BSKH"):
        np.testing.assert_allclose(getattr(got, field), getattr(expected, field), atol=1e-4, rtol=0, err_msg=field)


def test_blocks_of_slots_before_every_window_are_not_read():
    """A block of them would spoil whatever it is multiplied with. The program is that of the case's own test."""
    case = CASES["window of 130, chunk on a prefix"]
    q, k, v, d_out = arrays_of(case, jnp.float32)
    spoilt = [q, *(x.at[:, :BLOCK].set(jnp.nan) for x in (k, v)), d_out]
    got, expected = attended("xla", case, spoilt), truth(case, [q, k, v, d_out])
    np.testing.assert_allclose(got.out_BTNH, expected.out_BTNH, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got.dk_BSKH, expected.dk_BSKH, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window, visits", [(None, 10), (1, 4), (1024, 7), (1026, 9), (9999, 10)])
def test_splash_visits_blocks_of_1024_that_a_window_reaches(window, visits):
    pos = jnp.arange(4096, dtype=jnp.int32)[None]
    q_BKRH = jnp.zeros((1, 1, 4096, 1))
    rows = Rows(q_BKRH, pos, first_BR=None if window is None else pos - window + 1)
    assert splash_plan.promised_plan(rows, Slots(q_BKRH, q_BKRH, pos)).visit_rs.sum() == visits


def test_splash_attends_windows_over_more_slots_than_it_can_be_told_of(monkeypatch):
    for module in (splash, splash_plan):
        monkeypatch.setattr(module, "WINDOWED", 256)
    case = replace(CASES["window of 130, chunk on a prefix"], used=None, window=200)
    arrays = arrays_of(case, jnp.float32)
    expected, got = truth(case, arrays), attended("splash" if PLATFORM != "gpu" else "xla", case, arrays)
    for field in ("out_BTNH", "dq_BTNH", "dk_BSKH", "dv_BSKH"):
        np.testing.assert_allclose(getattr(got, field), getattr(expected, field), atol=1e-4, rtol=0, err_msg=field)


def test_a_span_of_slots_is_one_number():
    first, last, slot = (jnp.asarray(x, jnp.int32)[:, None] for x in ([0, 5, 32767], [32767, 9, 32767], [0, 5, 32767]))
    span = splash_plan._span(first, last)
    assert np.all(span != 0) and np.all(splash_plan.seen_span(span, slot))
    assert np.array_equal(splash_plan.seen_span(span, jnp.arange(8)[None])[:, :6].sum(axis=1), [6, 1, 0])
    assert not splash_plan.seen_span(jnp.zeros_like(span), slot).any()


@pytest.mark.parametrize("case", ROUNDED)
@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_nearer_than_dense_bfloat16(name, case):
    arrays = arrays_of(CASES[case], jnp.bfloat16, H=128)
    expected, got = truth(CASES[case], arrays), attended(name, CASES[case], arrays)

    @jax.jit
    def dense(q, k, v, d_out):
        out, pull = jax.vjp(lambda *qkv: dense_attention(*qkv, CASES[case].seen_BTS, xp=jnp), q, k, v)
        return out, *pull(d_out)

    rounded = Numbers(*(np.asarray(x, np.float32) for x in dense(*arrays)))
    for field in ("out_BTNH", "dq_BTNH", "dk_BSKH", "dv_BSKH"):
        exact = getattr(expected, field)
        far, dense_far = (np.sqrt(np.mean((getattr(x, field) - exact) ** 2)) for x in (got, rounded))
        assert far <= 0.6 * dense_far, (field, far / dense_far)


def primitives(jaxpr) -> Iterator[str]:
    """The names of a program's operations and of those inside them, kernels left out."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if equation.primitive.name != "pallas_call" and hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("case, branches", [("zigzag, own", 0), ("chunk on a prefix", 0), ("branches anywhere", 2)])
def test_splash_decides_nothing_where_ascending_positions_are_promised(case, branches):
    kernel = splash.Splash(BLOCK, interpret=True)
    attend = partial(_attended, kernel=kernel, case=CASES[case])
    names = list(primitives(jax.make_jaxpr(attend)(*arrays_of(CASES[case], jnp.float32)).jaxpr))
    assert names.count("pallas_call") == 3  # forward, dq, dk and dv
    assert (names.count("cond") > 0) == (branches > 0)


@pytest.mark.parametrize(
    "case, holds",
    [
        ("nothing promised, causal", True),
        ("branches in blocks of their own", True),
        ("branches anywhere", False),
        ("unsorted, rows and slots missing", False),
    ],
)
def test_splash_knows_which_positions_its_kernels_can_be_told(case, holds):
    case = CASES[case]
    q, k, v, _ = arrays_of(case, jnp.float32)
    rows, slots = case.rows(q), case.slots(k, v)[0]
    sizes = splash_plan.blocks_of(rows.pos_BR.shape[1], slots.pos_BS.shape[1], tagged=case.q_branch is not None)
    visits = jax.jit(partial(splash_plan.visits, bq=sizes[0], bkv=sizes[1]))
    assert visits(pad_rows(rows, sizes[0]), pad_slots(slots, sizes[1]))[1] == holds


@pytest.mark.parametrize(
    "case, kind, length",
    [
        ("nothing seen", 0, 0),
        ("chunk on a prefix", 1, 300),
        ("zigzag, of an earlier device", 1, 192),
        ("causal", 2, 384),
        ("zigzag, own", 2, 384),
        ("sequences of uneven lengths", 2, 300),
        ("zigzag, of a later device", 3, 384),
        ("branches anywhere", 3, 400),
        ("unsorted, rows and slots missing", 3, None),
        ("window of xla's block, causal", 4, 384),
        ("window of 1, lengths uneven", 4, 300),
        ("window of 130, chunk on a prefix", 3, None),
        ("window of splash's block, zigzag, own", 3, 384),
        ("window of 60, branches", 3, None),
    ],
)
def test_cudnn_knows_its_masks_by_the_positions(case, kind, length):
    case = replace(CASES[case], parts=1)
    q, k, v, _ = arrays_of(case, jnp.float32)
    found, length_B = jax.jit(cudnn._kind)(case.rows(q), case.slots(k, v)[0])
    assert found == kind and length in (None, length_B[0])


@pytest.mark.parametrize("window, known, kind", [(384, False, 2), (383, False, 3), (383, True, 4), (384, True, 2)])
def test_cudnn_needs_a_window_that_is_known_where_it_matters(window, known, kind):
    case = replace(CASES["causal"], window=window)
    q, k, v, _ = arrays_of(case, jnp.float32)
    rows = case.rows(q) if known else replace(case.rows(q), window=None)
    assert jax.jit(cudnn._kind)(rows, case.slots(k, v)[0])[0] == kind


def test_cudnn_attends_a_later_device_s_slots_with_the_late_run_alone():
    case = CASES["zigzag, of a later device"]
    q, k, v, _ = arrays_of(case, jnp.float32)
    rows = cudnn._split(case.rows(q), 2)
    kinds = [cudnn._kind(jax.tree.map(lambda x: x[i], rows), case.slots(k, v)[0])[0] for i in range(2)]  # noqa: B023
    assert [int(kind) for kind in kinds] == [0, 1]


def test_a_kernel_of_another_platform_is_refused():
    with pytest.raises(InputError, match="splash is for TPUs, got a GPU"):
        kernel_of("splash", "gpu", BLOCK)
    with pytest.raises(InputError, match="cudnn is for NVIDIA GPUs, got platform cpu"):
        kernel_of("cudnn", "cpu", BLOCK)
    with pytest.raises(InputError, match="kernel must be one of auto, xla, splash, cudnn, got 'flash'"):
        kernel_of("flash", "cpu", BLOCK)  # type: ignore[arg-type]
