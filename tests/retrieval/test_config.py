# SPDX-License-Identifier: Apache-2.0
"""The k rule, and what a configuration refuses."""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest

from rapid_jax.retrieval.config import JOIN_TOKENS, PAPER_THRESHOLD, RetrievalConfig, chunk_count, retrieved_tokens
from rapid_jax.runtime.errors import InputError

PAPER = RetrievalConfig()


def test_the_defaults_are_the_papers():
    assert (PAPER.chunk_tokens, PAPER.compression, PAPER.min_tokens, PAPER_THRESHOLD) == (512, 24, 4096, 0.3)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(100, 1), (512, 1), (2000, 4), (4096, 8), (8192, 8), (98304, 8), (98305, 9), (120000, 10), (131072, 11)],
)
def test_chunk_count_of_the_paper(length, expected):
    assert chunk_count(length, PAPER) == expected


@pytest.mark.parametrize(("length", "expected"), [(2000, 16), (4096, 32), (8192, 32), (131072, 32)])
def test_chunk_count_of_the_official_command_line(length, expected):
    assert chunk_count(length, replace(PAPER, chunk_tokens=128, compression=32)) == expected


def test_chunk_count_is_the_formula_in_exact_arithmetic():
    for length in [*range(1, 6000, 7), *range(98_290, 98_320), *range(196_600, 196_620), 524_288]:
        for chunk, compression, least in ((512, 24, 4096), (100, 7, 1), (300, 1, 1000)):
            config = RetrievalConfig(chunk_tokens=chunk, compression=compression, min_tokens=least)
            formula = max(Fraction(length, chunk * compression), min(Fraction(least, chunk), Fraction(length, chunk)))
            assert chunk_count(length, config) == ceil(formula)


@pytest.mark.parametrize(("length", "count"), [(100, 1), (4096, 8), (131072, 11)])
def test_room_is_that_of_full_chunks_and_joins(length, count):
    assert retrieved_tokens(length, PAPER) == count * (512 + JOIN_TOKENS)


def test_max_chunks_limits_the_count():
    assert chunk_count(131072, replace(PAPER, max_chunks=5)) == 5
    assert chunk_count(100, replace(PAPER, max_chunks=5)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk_tokens", 7),
        ("compression", 0),
        ("min_tokens", 0),
        ("max_chunks", 0),
        ("leaves", 0),
        ("batch_size", 0),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("index", "faiss"),
        ("policy", "best"),
        ("window_tokens", 0),
    ],
)
def test_bad_numbers_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"retrieval\.{field}: expected .*got"):
        replace(PAPER, **{field: value})


def test_no_prompt_no_count():
    with pytest.raises(InputError, match="at least one token"):
        chunk_count(0, PAPER)
