# SPDX-License-Identifier: Apache-2.0
"""RAPID on one screen: the enriched target distribution, and which drafted tokens survive it.

p: the target's distribution, q: the drafter's, both after temperature and filters; p_hat: the target's distribution
after the drafter's evidence is mixed in. G drafts a round, verified against G+1 rows of the target.

With eta = 0 the emitted tokens follow p exactly. With eta > 0 they do not: for one drafted position, with
m = min(q, p_hat) and R = sum max(p - m, 0), the distribution is  m + (1 - sum m) max(p - m, 0) / R.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rapid_jax.speculative.config import Guard
from rapid_jax.speculative.sampling import GUARDS, Numbers, SamplingParams, SamplingRule, along, draw
from rapid_jax.speculative.vocabulary import at, best


def augment(z_V: jax.Array, log_q_V: jax.Array, *, eta: Numbers, alpha: Numbers, guard: Guard) -> jax.Array:
    """log p_hat over the last axis, p_hat = softmax(z + eta (q - p)) with p = softmax(z) (RAPID Eq. 6).

    guard code   the shift is zero where q < alpha max q (the released code)
    guard paper  where p_hat < alpha max p_hat, p_hat is p again (Eq. 9); the result may sum to more than 1
    guard none   Eq. 6 alone
    A token that the target's filters removed (z = -inf) stays impossible.
    """
    log_p, q = jax.nn.log_softmax(z_V, axis=-1), jnp.exp(log_q_V)
    shift = q - jnp.exp(log_p)
    if guard == "code":
        shift = jnp.where(q >= alpha * jnp.max(q, axis=-1, keepdims=True), shift, 0.0)
    log_p_hat = jax.nn.log_softmax(z_V + eta * shift, axis=-1)
    if guard == "paper":
        p_hat = jnp.exp(log_p_hat)
        log_p_hat = jnp.where(p_hat < alpha * jnp.max(p_hat, axis=-1, keepdims=True), log_p, log_p_hat)
    return log_p_hat


def leading_accepts(log_ratio_BG: jax.Array, log_r_BG: jax.Array, length_B: jax.Array) -> jax.Array:
    """int32 [B]: how many drafts are accepted before the first with log r > log p_hat(x) - log q(x) (Alg. 1 l. 18)."""
    inside = jnp.arange(log_ratio_BG.shape[1]) < length_B[:, None]
    return jnp.cumprod((log_r_BG <= log_ratio_BG) & inside, axis=1).sum(axis=1).astype(jnp.int32)


def residual(p_V: jax.Array, q_V: jax.Array, p_hat_V: jax.Array, *, exact_phat: bool | Numbers) -> jax.Array:
    """The unnormalised distribution after a rejection: max(p - q, p - p_hat, 0) (Eq. 10), or max(p_hat - q, 0).

    Where nothing is left of it, which exact arithmetic never meets, p.
    """
    exact_V, left_V = jnp.maximum(p_hat_V - q_V, 0.0), jnp.maximum(p_V - jnp.minimum(q_V, p_hat_V), 0.0)
    left = jnp.where(exact_phat, exact_V, left_V)
    return jnp.where(jnp.sum(left, axis=-1, keepdims=True) > 0, left, p_V)


def _row(rows_BGV: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows_BGV, index_B[:, None, None], axis=1)[:, 0]


def leading_agreement(proposed_BG: jax.Array, drawn_BG: jax.Array, length_B: jax.Array) -> jax.Array:
    """int32 [B]: how many proposals equal what was drawn at their place, up to the first that does not.

    Accepting a copied token where it equals an independent draw from p keeps p exactly: it is accepted with
    probability p(x), and what replaces it otherwise is a draw from p known to differ from x.
    """
    inside = jnp.arange(proposed_BG.shape[1]) < length_B[:, None]
    return (
        jnp.cumprod((proposed_BG == drawn_BG[:, : proposed_BG.shape[1]]) & inside, axis=1).sum(axis=1).astype(jnp.int32)
    )


def verify(
    keys: tuple[jax.Array, jax.Array],
    drafts_BG: jax.Array,
    log_q_BGV: jax.Array,
    length_B: jax.Array,
    z_BGV: jax.Array,
    rule: SamplingRule,
    params: SamplingParams,
) -> tuple[jax.Array, jax.Array]:
    """(n accepted [B], the token after them [B]), for G >= 1 drafts drawn from q.

    `z_BGV` has one row more than `drafts_BG`; only the first `length_B` drafts of a row count. `keys` are for accepting
    [B, G] and for the token [B, G + 1]. After a rejection the token comes from the residual; after a full accept it is
    a bonus from the unmodified p of the next row (there is no q there, so p_hat is undefined). Greedy: a draft is
    accepted when it is the argmax of p_hat, and that is the token after a rejection; the bonus is the target's argmax.
    With eta = 0 all are the target's. (Ours: the paper has no greedy rule, and its code none that works.)
    """
    accept_keys_BG, token_keys_BG = keys
    best_BG = best(z_BGV)
    if not rule.has_q:
        return _accept_greedy(drafts_BG, length_B, best_BG)
    log_p_hat_BGV = enrich(z_BGV[:, :-1], log_q_BGV, rule, params)
    if rule.transfer:
        is_drafted_BG = jnp.arange(drafts_BG.shape[1]) < length_B[:, None]
        moved_BG = is_drafted_BG & (along(params.eta_B, best_BG) > 0)
        best_BG = best_BG.at[:, :-1].set(jnp.where(moved_BG, best(log_p_hat_BGV), best_BG[:, :-1]))
    best_n_B, best_B = _accept_greedy(drafts_BG, length_B, best_BG)
    if rule.greedy:
        return best_n_B, best_B
    above_zero = partial(jax.random.uniform, minval=jnp.finfo(jnp.float32).tiny)
    log_r_BG = jnp.log(jax.vmap(jax.vmap(above_zero))(accept_keys_BG))
    n_B = leading_accepts(at(log_p_hat_BGV, drafts_BG) - at(log_q_BGV, drafts_BG), log_r_BG, length_B)
    n_B = jnp.where(params.greedy_B, best_n_B, n_B)

    p_BV = jax.nn.softmax(_row(z_BGV, n_B), axis=-1)
    rejected_B = jnp.minimum(n_B, drafts_BG.shape[1] - 1)
    q_BV, p_hat_BV = jnp.exp(_row(log_q_BGV, rejected_B)), jnp.exp(_row(log_p_hat_BGV, rejected_B))
    exact_phat = along(params.exact_phat_B, p_BV) if rule.exact_phat else False
    left_BV = residual(p_BV, q_BV, p_hat_BV, exact_phat=exact_phat)
    final_BV = jnp.where((n_B < length_B)[:, None], left_BV, p_BV)
    token_keys_B1 = jnp.take_along_axis(token_keys_BG, n_B[:, None], axis=1)
    token_B = draw(token_keys_B1, jnp.log(final_BV)[:, None], rule, params)[:, 0]
    return n_B, jnp.where(params.greedy_B, best_B, token_B)


def enrich(z_BGV: jax.Array, log_q_BGV: jax.Array, rule: SamplingRule, params: SamplingParams) -> jax.Array:
    """log p_hat [B, G, V], each row by its own eta and guard; normalised where p_hat itself is what is sampled."""

    def by(guard: Guard) -> jax.Array:
        eta, alpha = along(params.eta_B, z_BGV), along(params.alpha_B, z_BGV)
        log_p_hat_BGV = augment(z_BGV, log_q_BGV, eta=eta, alpha=alpha, guard=guard)
        if not (rule.exact_phat and guard == "paper"):
            return log_p_hat_BGV
        return jnp.where(along(params.exact_phat_B, z_BGV), jax.nn.log_softmax(log_p_hat_BGV, axis=-1), log_p_hat_BGV)

    if rule.guard != "mixed":
        return by(rule.guard)
    guard_B11 = along(params.guard_B, z_BGV)
    first, *others = GUARDS
    found = by(first)
    for guard in others:
        found = jnp.where(guard_B11 == GUARDS.index(guard), by(guard), found)
    return found


def _accept_greedy(drafts_BG: jax.Array, length_B: jax.Array, best_BG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(drafts that are the best token of their place, up to the first that is not; the best one after them)."""
    n_B = leading_agreement(drafts_BG, best_BG, length_B)
    return n_B, jnp.take_along_axis(best_BG, n_B[:, None], axis=1)[:, 0]
