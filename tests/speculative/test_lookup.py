# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup against a plain search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.speculative.lookup import framed, propose


@functools.partial(jax.jit, static_argnames=("width", "least"))
def proposals(text_BM, recent_BR, *, width, least):
    return propose([framed(text_BM, recent_BR.shape[1], width)], recent_BR, width=width, least=least)


def plain_search(text: list[int], recent: list[int], width: int, least: int) -> list[int]:
    """What followed the longest occurrence of the last tokens, the latest of equals."""
    best, best_length = -1, 0
    for at in range(len(text)):
        if text[at] == -1:
            continue
        length = 0
        while length < len(recent) and length < at and recent[-1 - length] == text[at - 1 - length] != -1:
            length += 1
        if length >= max(best_length, least):
            best, best_length = at, length
    if best < 0:
        return []
    copied = [*text[best : best + width], -1]
    return copied[: copied.index(-1)]


def copies(text: list[int], recent: list[int], *, width: int = 3, least: int = 2) -> list[int]:
    tokens_BW, count_B = proposals(jnp.asarray([text]), jnp.asarray([recent]), width=width, least=least)
    assert tokens_BW.shape == (1, width)
    return tokens_BW[0, : int(count_B[0])].tolist()


def test_the_longest_match_wins():
    assert copies([1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 0, 0], [7, 1, 2, 3]) == [40, 41, 9]


def test_the_latest_of_equal_matches_wins():
    assert copies([2, 3, 40, 41, 42, 9, 2, 3, 50, 51, 52, 8], [7, 6, 2, 3]) == [50, 51, 52]


def test_fewer_than_the_least_match_is_no_match():
    text = [1, 2, 3, 40, 41, 42, 43, 44, 45, 46, 47, 48]
    assert copies(text, [9, 9, 2, 3]) == [40, 41, 42]
    assert copies(text, [9, 9, 9, 3]) == []


def test_a_copy_ends_with_the_text_and_at_a_gap():
    assert copies([9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3, 40], [0, 1, 2, 3]) == [40]
    assert copies([2, 3, 40, -1, 41, 42, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3]) == [40]
    assert copies([9, 8, 7, 6, 5, 4, 3, 9, 1, 1, 2, 3], [0, 0, 2, 3]) == []


def test_no_token_matches_no_token():
    """A prompt shorter than the recent window leaves -1 there, which agrees with nothing, least of all with a gap."""
    assert copies([3, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [-1, -1, -1, 3]) == []
    assert copies([5, -1, -1, 3, 40, 41, 42, 43, 44, 45, 46, 47], [-1, -1, -1, 3]) == []
    assert copies([-1] * 12, [-1] * 4) == []
    assert copies([2, 3, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [-1, -1, 2, 3]) == [40, 41, 42]


def test_a_copy_may_run_into_what_it_matches():
    assert copies([5, 6, 5, 6, 5, 6, -1, -1, -1, -1, -1, -1], [5, 6, 5, 6]) == [5, 6]


@pytest.mark.parametrize(("alphabet", "least"), [(2, 1), (2, 3), (4, 2)])
def test_random_texts(alphabet, least):
    rng = np.random.default_rng(alphabet * 10 + least)
    text_BM = rng.integers(0, alphabet, (400, 24))
    text_BM[rng.random(text_BM.shape) < 0.08] = -1
    recent_BR = rng.integers(0, alphabet, (400, 5))
    recent_BR[:40, :2] = -1
    tokens_BW, count_B = proposals(jnp.asarray(text_BM), jnp.asarray(recent_BR), width=4, least=least)
    found = functools.partial(plain_search, width=4, least=least)
    want = [found(text, recent) for text, recent in zip(text_BM.tolist(), recent_BR.tolist(), strict=True)]
    got = [row[:count] for row, count in zip(tokens_BW.tolist(), count_B.tolist(), strict=True)]
    assert got == want
    assert len({len(row) for row in want}) > 2, "the cases were meant to differ"
    assert int(tokens_BW.min()) >= 0  # what does not count is still a token id


def test_two_texts_are_as_one_with_a_gap_between():
    rng = np.random.default_rng(3)
    first, second = (rng.integers(0, 3, (200, size)) for size in (20, 9))
    recent = jnp.asarray(rng.integers(0, 3, (200, 5)))
    joined = np.concatenate([first, np.full((200, 1), -1), second], axis=1)

    def counted(tokens_BW, count_B) -> list[list[int]]:
        return [row[:count] for row, count in zip(tokens_BW.tolist(), count_B.tolist(), strict=True)]

    want = counted(*proposals(jnp.asarray(joined), recent, width=4, least=2))
    both = [framed(jnp.asarray(text), 5, 4) for text in (first, second)]
    assert counted(*propose(both, recent, width=4, least=2)) == want
    for text in (first, second):  # each of them gives some of the copies
        assert counted(*proposals(jnp.asarray(text), recent, width=4, least=2)) != want
