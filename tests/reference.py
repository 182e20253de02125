# SPDX-License-Identifier: Apache-2.0
"""Ten-line truths that the fast paths are tested against. Plain, slow, and float64 where it is numpy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import scipy.stats


def dense_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS, *, xp: Any = np):
    """softmax(q k / sqrt(H)) v with every score at once; a query that sees nothing gets 0."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = xp.repeat(k_BSKH, group, axis=2), xp.repeat(v_BSKH, group, axis=2)
    score = xp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * q_BTNH.shape[-1] ** -0.5
    seen = visible_BTS[:, None]
    score = xp.where(seen, score, -1e30)
    weight = xp.where(seen, xp.exp(score - xp.max(score, axis=-1, keepdims=True)), 0.0)
    weight = weight / xp.maximum(xp.sum(weight, axis=-1, keepdims=True), 1e-30)
    return xp.einsum("BNTS,BSNH->BTNH", weight, v_BSNH)


def dense_gradients(q_BTNH, k_BSKH, v_BSKH, visible_BTS, d_out_BTNH):
    """The gradients of `dense_attention` at q, k and v, written out: with p the weights and dp = d_out v^T,

    ds = p (dp - sum_s p dp), dq = ds k / sqrt(H), dk = ds^T q / sqrt(H), dv = p^T d_out; k and v sum over their group.
    """
    B, S, K, H = k_BSKH.shape
    group = q_BTNH.shape[2] // K
    k_BSNH, v_BSNH = np.repeat(k_BSKH, group, axis=2), np.repeat(v_BSKH, group, axis=2)
    score = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * H**-0.5
    score = np.where(visible_BTS[:, None], score, -1e30)
    p = np.where(visible_BTS[:, None], np.exp(score - score.max(axis=-1, keepdims=True)), 0.0)
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1e-30)
    dp = np.einsum("BTNH,BSNH->BNTS", d_out_BTNH, v_BSNH)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * H**-0.5
    dk, dv = np.einsum("BNTS,BTNH->BSNH", ds, q_BTNH), np.einsum("BNTS,BTNH->BSNH", p, d_out_BTNH)
    grouped = (B, S, K, group, H)
    return np.einsum("BNTS,BSNH->BTNH", ds, k_BSNH), dk.reshape(grouped).sum(axis=3), dv.reshape(grouped).sum(axis=3)


def visible(q_pos_BT, kv_pos_BS, q_branch_BT=None, kv_branch_BS=None, *, window=None) -> np.ndarray:
    """bool [B, T, S]: 0 <= key position <= query position, less than `window` behind it, and branch tags equal or one
    of them 0.
    """
    q, kv = np.asarray(q_pos_BT)[:, :, None], np.asarray(kv_pos_BS)[:, None, :]
    seen = (kv >= 0) & (kv <= q)
    if window is not None:
        seen &= kv > q - window
    if q_branch_BT is not None:
        mine, theirs = np.asarray(q_branch_BT)[:, :, None], np.asarray(kv_branch_BS)[:, None, :]
        seen &= (mine == theirs) | (mine == 0) | (theirs == 0)
    return seen


def softmax(z: np.ndarray) -> np.ndarray:
    weight = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def coarse_reverse_kl(z_TV: np.ndarray, teacher_z_TV: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(KL(P || Q) [T], its gradient at z [T, V]) of softmaxes on the teacher's k first tokens and one bucket of others.

    With p the softmax of z and M[v, j] = 1 where token v is in bucket j: P = p M, dP/dz = (diag(p) - p p^T) M.
    """
    found, gradients = [], []
    for z, teacher_z in zip(z_TV, teacher_z_TV, strict=True):
        bucket = np.full(z.size, k)
        bucket[np.argsort(-teacher_z, kind="stable")[:k]] = np.arange(k)
        member_VJ, p = np.eye(k + 1)[bucket], softmax(z)
        log_ratio = np.log(p @ member_VJ) - np.log(softmax(teacher_z) @ member_VJ)
        found.append(p @ member_VJ @ log_ratio)
        gradients.append((np.diag(p) - np.outer(p, p)) @ member_VJ @ (log_ratio + 1))
    return np.array(found), np.array(gradients)


@dataclass(frozen=True)
class OneStep:
    """What happens to one drafted position, in float64."""

    p: np.ndarray
    p_hat: np.ndarray
    kept: np.ndarray  # m: probability that a token is drafted and accepted
    residual: np.ndarray  # distribution of the token after a rejection, or p where a rejection cannot happen
    distribution: np.ndarray  # of the emitted token

    @property
    def acceptance(self) -> float:
        return float(self.kept.sum())


def one_step(z, q, *, eta: float, guard: str, alpha: float = 0.1, exact_phat: bool = False) -> OneStep:
    """RAPID's rule for one drafted position: z is already divided by the temperature and filtered."""
    z, q = np.asarray(z, np.float64), np.asarray(q, np.float64)
    p = softmax(z)
    shift = np.where(q >= alpha * q.max(), q - p, 0.0) if guard == "code" else q - p
    p_hat = softmax(z + eta * shift)
    if guard == "paper":
        p_hat = np.where(p_hat < alpha * p_hat.max(), p, p_hat)
        p_hat = p_hat / p_hat.sum() if exact_phat else p_hat
    m = np.minimum(q, p_hat)
    left = np.maximum(p_hat - q, 0.0) if exact_phat else np.maximum(p - m, 0.0)
    residual = left / left.sum() if left.sum() > 1e-15 else p
    return OneStep(p, p_hat, m, residual, m + (1 - m.sum()) * residual)


def sequence_distribution(
    rows: Callable[[tuple[int, ...]], OneStep],
    q_rows: Callable[[tuple[int, ...]], np.ndarray],
    *,
    vocabulary: int,
    length: int,
    gamma: int,
    confidence_stop: float = 0.0,
) -> np.ndarray:
    """The exact distribution of the first `length` tokens of rounds of `gamma` drafts, [vocabulary] * length.

    `open` drafts are left in the round: an accepted draft goes on, a rejection starts the next round, and with none
    left comes the bonus from p and then the next round.
    """
    distribution = np.zeros((vocabulary,) * length)

    def walk(said: tuple[int, ...], left: int, chance: float) -> None:
        if len(said) == length:
            distribution[said] += chance
            return
        step, q = rows(said), q_rows(said)
        for token in range(vocabulary):
            if left == 0:
                walk((*said, token), gamma, chance * step.p[token])
                continue
            after = 0 if q[token] < confidence_stop else left - 1
            walk((*said, token), after, chance * step.kept[token])
            walk((*said, token), gamma, chance * (1 - step.acceptance) * step.residual[token])

    walk((), gamma, 1.0)
    return distribution


def all_sequences(vocabulary: int, length: int) -> np.ndarray:
    """Every sequence, [vocabulary ** length, length], in the order of `ndarray.ravel` of a distribution."""
    return np.array(list(product(range(vocabulary), repeat=length)), np.int32)


def chi_square_p(counts: np.ndarray, distribution: np.ndarray) -> float:
    """The chance of counts at least this far from the distribution; 0 where something impossible happened.

    Outcomes expected fewer than 5 times are counted as one.
    """
    counts = np.ravel(counts).astype(np.float64)
    expected = np.ravel(distribution) / np.sum(distribution) * np.sum(counts)
    if np.any(counts[expected < 1e-9 * counts.sum()] > 0):
        return 0.0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    statistic = np.sum((counts[used] - expected[used]) ** 2 / expected[used])
    return float(scipy.stats.chi2.sf(statistic, max(used.sum() - 1, 1)))


def greedy(
    next_logits: Callable[[Sequence[int]], np.ndarray],
    prompt: Sequence[int],
    count: int,
    *,
    stops: Sequence[int] = (),
    penalty: float = 1.0,
    seen: Sequence[int] = (),
) -> list[int]:
    """The argmax, token by token, each from the logits after the whole sequence."""
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in stops):
        logits = np.array(next_logits([*prompt, *said]), np.float32)
        for token in {*seen, *said}:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        said.append(int(np.argmax(logits)))
    return said


def enriched_greedy(
    target: Callable[[Sequence[int]], np.ndarray],
    drafter: Callable[[Sequence[int]], np.ndarray],
    count: int,
    *,
    gamma: int,
    eta: float,
    guard: str,
    temperature: float,
    stops: Sequence[int] = (),
) -> list[int]:
    """The greedy answer that a drafter moves: where a token was drafted, the argmax of p-hat, of p and q at the
    transfer temperature; after the last draft of a round the target's. The functions give logits after what was said.
    """
    said: list[int] = []
    while True:
        drafts: list[int] = []
        while len(drafts) < gamma and not (drafts and drafts[-1] in stops):
            drafts.append(int(np.argmax(drafter([*said, *drafts]))))
        for draft in [*drafts, None]:
            z = np.array(target(said), np.float64) / temperature
            q = softmax(np.array(drafter(said), np.float64) / temperature)
            said.append(int(np.argmax(z if draft is None else one_step(z, q, eta=eta, guard=guard).p_hat)))
            if len(said) == count or said[-1] in stops:
                return said
            if said[-1] != draft:
                break
