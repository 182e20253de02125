# SPDX-License-Identifier: Apache-2.0
"""Top k, threshold, order, duplicates, fallback."""

import numpy as np
import pytest

from rapid_jax.retrieval.chunk import Chunk
from rapid_jax.retrieval.config import JOIN_TOKENS
from rapid_jax.retrieval.select import fill, select

ROWS_NE = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0.8, 0, 0.6], [-0.6, 0, 0.8]], np.float32)
QUERY_E = np.array([0.8, 0.6, 0], np.float32)
CHUNKS = [Chunk(10 * i, 10 * i + 10, f" text {i}\n", 3) for i in range(5)]
SCORES = ROWS_NE @ QUERY_E


def starts(selection):
    return [chunk.start // 10 for chunk in selection.chunks]


def test_cosine_example_of_the_specification():
    np.testing.assert_allclose(SCORES, [0.8, 0.96, 0.6, 0.64, -0.48], atol=1e-6)
    kept = select(SCORES, CHUNKS, 3, 0.3)
    assert starts(kept) == [0, 1, 3]
    np.testing.assert_allclose(kept.scores, [0.8, 0.96, 0.64], atol=1e-6)
    assert (kept.kept, kept.considered, kept.tokens, kept.fallback) == (3, 5, 9, False)
    assert starts(select(SCORES, CHUNKS, 3, 0.7)) == [0, 1]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.64, 0.7, 0.8])
def test_the_threshold_is_inclusive_in_float32(threshold):
    """float32(0.7) and float32(0.8) lie on different sides of the decimals; both reach them."""
    at = np.float32(threshold)
    scores = np.array([at, np.nextafter(at, np.float32(-1)), 1], np.float32)
    assert starts(select(scores, CHUNKS[:3], 3, threshold)) == [0, 2]


def test_nothing_above_the_threshold_keeps_the_best_and_says_so():
    selection = select(SCORES, CHUNKS, 3, 0.97)
    assert starts(selection) == [1]
    assert selection.fallback


def test_order_is_the_documents_whatever_the_scores():
    selection = select([0.4, 0.5, 0.9], [CHUNKS[4], CHUNKS[0], CHUNKS[2]], 3, 0.3)
    assert starts(selection) == [0, 2, 4]
    np.testing.assert_allclose(selection.scores, [0.5, 0.9, 0.4], atol=1e-6)


def test_a_chunk_given_twice_is_kept_once_and_takes_one_place():
    selection = select([0.9, 0.8, 0.9, 0.7], [CHUNKS[1], CHUNKS[3], CHUNKS[1], CHUNKS[0]], 3, 0.3)
    assert starts(selection) == [0, 1, 3]
    assert selection.considered == 3


def test_equal_scores_prefer_the_earlier_chunk():
    assert starts(select([0.5] * 5, CHUNKS[::-1], 2, 0.3)) == [0, 1]


def test_text_joins_stripped_chunks():
    assert select(SCORES, CHUNKS, 2, 0.3).text == "text 0\n\ntext 1"
    assert select(SCORES, CHUNKS, 2, 0.3, join=" ... ").text == "text 0 ... text 1"


def test_k_beyond_the_chunks_keeps_all_that_reach_the_threshold():
    assert starts(select(SCORES, CHUNKS, 50, -1.0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("scores", "k"), [([0.5], 1), ([float("nan")] * 5, 1), ([0.5] * 5, 0)])
def test_what_cannot_be_selected_from_is_refused(scores, k):
    with pytest.raises(ValueError, match="expected"):
        select(scores, CHUNKS, k, 0.3)


NEIGHBOURS = [Chunk(10 * i, 10 * i + 10, f"text {i}.  \n\n", tokens) for i, tokens in enumerate((30, 50, 8, 40, 20))]
ORDER = [3, 1, 4, 0, 2]
KNOWN = dict(zip(ORDER, (0.9, 0.6, 0.4, 0.2, -0.1), strict=True))


def filled(budget, **options):
    return fill(ORDER, KNOWN, NEIGHBOURS, budget, **options)


def test_a_document_that_fits_goes_in_whole_as_it_is():
    whole = filled(148)
    assert starts(whole) == [0, 1, 2, 3, 4] and not whole.fallback
    assert whole.text == "".join(chunk.text for chunk in NEIGHBOURS).strip()
    assert starts(filled(148, threshold=0.5)) == [0, 1, 2, 3, 4]
    assert len(filled(147).chunks) < 5 and len(filled(148, most=4).chunks) == 4


def test_the_budget_is_filled_in_order_of_score():
    """50 does not fit behind 40 and is passed over; 20 and 8 do."""
    assert starts(filled(40 + 20 + 8 + 3 * JOIN_TOKENS)) == [2, 3, 4]
    assert starts(filled(40 + 50 + 2 * JOIN_TOKENS)) == [1, 3]
    assert starts(filled(147)) == [1, 2, 3, 4]
    np.testing.assert_allclose(filled(147).scores, [0.6, -0.1, 0.9, 0.4])


@pytest.mark.parametrize("budget", range(1, 160, 7))
def test_what_fills_a_budget_is_within_it(budget):
    selection = filled(budget, join=" | ")
    joins = selection.text.count(" | ")
    assert selection.tokens + JOIN_TOKENS * joins <= budget or (starts(selection) == [3] and selection.fallback)


def test_neighbours_stand_as_in_the_document():
    assert filled(116, join=" ... ").text == "text 1. ... text 3.  \n\ntext 4."


def test_of_a_threshold_and_a_limit():
    assert starts(filled(147, threshold=0.6)) == [1, 3] and starts(filled(147, most=1)) == [3]
    none = filled(147, threshold=0.95)
    assert starts(none) == [3] and none.fallback
