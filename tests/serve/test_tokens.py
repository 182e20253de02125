# SPDX-License-Identifier: Apache-2.0
"""How tokens are shown: texts that join to the answer, whatever the tokens are parts of."""

import random

import pytest

from rapid_jax.answer import Transcript
from rapid_jax.engine.request import Piece, TokenLogprobs
from rapid_jax.serve.tokens import OriginSpans, TokenTexts
from rapid_jax.speculative.state import Origin
from tests.serve.engine import tokenizer

TEXTS = ["the document again", "na\u00efve \u732b\u732b \U0001f408 the end", "a\n\nb  c", "\u732b"]


def pieces(ids: list[int], size: int, stops: tuple[str, ...] = ()) -> list[Piece]:
    """The ids, some at a time, with what of the text may be told by then."""
    told: list[str] = []
    transcript, found = Transcript(tokenizer(), stops, told.append), []
    for at in range(0, len(ids), size):
        before = len(transcript.token_ids)
        part = ids[at : at + size]
        transcript.on_tokens(0, part, [one % len(Origin) for one in part])
        found.append(Piece("".join(told), transcript.token_ids[before:], transcript.origins[before:]))
        told.clear()
    transcript.finish()
    return [*found, Piece("".join(told), [], [])]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_spans_join_to_each_pieces_text(text: str, size: int):
    spans = OriginSpans(tokenizer())
    for piece in pieces([*tokenizer().encode_quoted(text), *tokenizer().stop_ids], size):
        found = spans.of(piece)
        assert "".join(span["text"] for span in found) == piece.text
        assert all(span["text"] for span in found)


def test_a_span_has_the_origin_of_the_token_that_completed_it():
    ids = tokenizer().encode_quoted("the \u732b")
    spans = OriginSpans(tokenizer())
    parts = [span for piece in pieces(ids, 2) for span in spans.of(piece)]
    assert parts[-1] == {"text": "\u732b", "origin": Origin(ids[-1] % 4).name.lower()}


@pytest.mark.parametrize("marks", ["<think>\n\n</think>\n\n", "\n\n</think>\n\n"])
def test_spans_where_nothing_was_thought(marks: str):
    """The marks are no part of the answer, though no piece has thoughts."""
    thought, answer = tokenizer().encode_quoted(marks), tokenizer().encode_quoted("the end")
    spans = OriginSpans(tokenizer())
    quiet = spans.of(Piece("", thought, [int(Origin.BONUS)] * len(thought)))
    found = spans.of(Piece("the end", answer, [int(Origin.DRAFT)] * len(answer)))
    assert not quiet and {span["origin"] for span in found} == {"draft"}
    assert "".join(span["text"] for span in found) == "the end"


def test_spans_of_broken_bytes_and_of_texts_that_a_stop_held_back():
    generator = random.Random(0)
    for stops in ((), ("a", "the"), ("the document is over",)):
        for size in (1, 3):
            ids = [generator.randrange(3, 320) for _ in range(60)]
            spans = OriginSpans(tokenizer())
            for piece in pieces(ids, size, stops):
                assert "".join(span["text"] for span in spans.of(piece)) == piece.text


def test_texts_of_tokens_and_their_bytes():
    texts = TokenTexts(tokenizer())
    ids = tokenizer().encode_quoted("the \u732b")
    entries = [TokenLogprobs(one, -1.0, ((one, -1.0), (ids[0], -2.0))) for one in ids]
    shown = texts.chat(entries)
    assert shown[0]["token"] == tokenizer().decode(ids[:1]) and bytes(shown[0]["bytes"]).decode() == shown[0]["token"]
    parts = [one for one in shown if one["bytes"] is None]  # three bytes of one character
    assert len(parts) == 3 and len({one["token"] for one in parts}) == 3
    assert texts.decoded([*ids, *tokenizer().stop_ids]) == "the \u732b<|im_end|>"


def test_a_token_without_any_probability_is_told_in_json():
    never = TokenLogprobs(5, float("-inf"), ((5, float("-inf")),))
    texts = TokenTexts(tokenizer())
    assert texts.chat([never])[0]["logprob"] == -9999.0
    told = texts.completion([never], [5], 0)
    assert (told["token_logprobs"], told["top_logprobs"]) == ([-9999.0], [{texts.of(5): -9999.0}])


def test_of_two_tokens_with_one_text_the_more_probable_counts():
    texts = TokenTexts(tokenizer())
    entry = TokenLogprobs(5, -0.5, ((5, -0.5), (5, -3.0)))
    assert texts.completion([entry], [5], 7) == {
        "tokens": [texts.of(5)],
        "token_logprobs": [-0.5],
        "top_logprobs": [{texts.of(5): -0.5}],
        "text_offset": [7],
    }
