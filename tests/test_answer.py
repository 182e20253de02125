# SPDX-License-Identifier: Apache-2.0
"""The answer as it grows: whole characters, stop texts, and what each piece told is worth."""

import json
import random

import pytest

from rapid_jax.answer import Answer, Transcript
from rapid_jax.conversation import Prompt
from rapid_jax.model.thinking import Thinking
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import Reading
from rapid_jax.retrieval.chunk import Chunk
from rapid_jax.retrieval.select import Selection
from rapid_jax.speculative.generate import Generation
from tests.tiny_models import tokenizer_files

TEXT = "one two\n\nStop here. \u65e5\u672c\u8a9e \U0001f600 and END of it"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_files(["the text and the question"]))


def told(tokenizer: Tokenizer, stops: list[str], seed: int) -> tuple[Transcript, list[str]]:
    """TEXT token by token in calls of random size; what the listener got."""
    pieces: list[str] = []
    transcript = Transcript(tokenizer, stops, pieces.append)
    ids, generator = tokenizer.encode(TEXT), random.Random(seed)
    while ids and not transcript.stopped:
        size = generator.randint(1, 7)
        stopped = transcript.on_tokens(0, ids[:size], [1] * len(ids[:size]))
        assert stopped == transcript.stopped
        assert "".join(pieces) == transcript.text[: len("".join(pieces))]
        ids = ids[size:]
    transcript.finish()
    return transcript, pieces


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([], TEXT),
        (["absent", ""], TEXT),
        (["END"], TEXT[: TEXT.index("END")]),
        (["\n\nStop", "two"], "one "),
        (["\U0001f600"], TEXT[: TEXT.index("\U0001f600")]),
        (["it and more"], TEXT),
    ],
)
def test_what_is_told_joins_to_the_answer_before_the_first_stop_text(stops, expected, seed, tokenizer):
    transcript, pieces = told(tokenizer, stops, seed)
    assert transcript.text == expected == "".join(pieces)
    assert transcript.stopped == (expected != TEXT)
    assert len(transcript.token_ids) == len(transcript.origins)
    # The tokens end with the one that completed the stop text.
    decoded = tokenizer.decode(transcript.token_ids)
    assert decoded.startswith(expected) and (expected == TEXT) == (decoded == TEXT)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("said", "opened", "thoughts", "text"),
    [
        ("<think>\nWhat? STOP <b>\n</think>\n\nIt is.", False, "What? STOP <b>", "It is."),
        (" <think></think>Yes", False, "", "Yes"),
        ("so </thi</think>\nYes </think>", True, "so </thi", "Yes </think>"),
        ("<think>\nnever done </thin", False, "never done </thin", ""),
        ("<thi", False, "", "<thi"),
        ("  No <think>x</think>", False, "", "  No <think>x</think>"),
        ("a STOP b</think>c STOP d", True, "a STOP b", "c "),
    ],
)
def test_thinking_is_told_apart_from_the_answer(said, opened, thoughts, text, seed, tokenizer):
    pieces: list[str] = []
    transcript = Transcript(tokenizer, ["STOP"], pieces.append)
    transcript.thinking = Thinking(opened=opened)
    ids, generator = tokenizer.encode_quoted(said), random.Random(seed)
    while ids and not transcript.stopped:
        size = generator.randint(1, 5)
        transcript.on_tokens(0, ids[:size], [1] * len(ids[:size]))
        ids = ids[size:]
    transcript.finish()
    assert (transcript.thoughts, transcript.text, "".join(pieces)) == (thoughts, text, text)


def test_a_character_that_never_ends_is_told_at_last(tokenizer):
    pieces: list[str] = []
    transcript = Transcript(tokenizer, [], pieces.append)
    first, *_ = tokenizer.encode("\U0001f600")
    transcript.on_tokens(0, [*tokenizer.encode("a"), first], [0, 0])
    assert pieces == ["a"]
    transcript.finish()
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_nothing_is_told_of_what_may_become_a_stop_text(tokenizer):
    pieces: list[str] = []
    transcript = Transcript(tokenizer, ["STOP"], pieces.append)
    for letter in "aST":
        transcript.on_tokens(0, tokenizer.encode(letter), [0])
    assert "".join(pieces) == "a"
    transcript.on_tokens(0, tokenizer.encode("x"), [0])
    assert "".join(pieces) == "aSTx"


def generation(**changed) -> Generation:
    values = {
        "tokens": [[5, 6, 7]],
        "origins": [[1, 1, 2]],
        "finish_reasons": ["stop"],
        "drafted": [8],
        "accepted": [6],
        "rejected": [1],
        "rounds": [2],
        "copied": [3],
        "copied_accepted": [1],
        "draft_steps": 9,
        "target_steps": 2,
        "gammas": {4: 2},
        "prepare_seconds": 0.5,
        "compile_seconds": 0.25,
        "decode_seconds": 1.5,
    }
    return Generation(**values | changed)


SELECTION = Selection((Chunk(3, 9, "chunk.", 2),), (0.5,), 4, False)


def reading(
    selection: Selection | None = SELECTION, *, tokens: int = 100, document_tokens: int = 90, truncated: bool = False
) -> Reading:
    """A prompt of so many tokens; where something was retrieved, another of 20."""
    short = None if selection is None else Prompt([2] * 15, [3] * 5)
    return Reading(Prompt([0] * (tokens - 5), [1] * 5), short, selection, document_tokens, truncated=truncated)


def answer(**changed) -> Answer:
    values = {
        "text": "abc",
        "token_ids": [5, 6, 7],
        "origins": [1, 1, 2],
        "finish_reason": "stop",
        "mode": "rapid",
        "eta": 10.0,
        "gamma": "auto",
        "generation": generation(),
        "reading": reading(),
        "prefix_reused": True,
        "seconds": {"load": 1.0, "retrieval": 0.1, "prefill": 2.0, "compile": 79.2, "first_token": 2.2, "decode": 1.5},
    }
    return Answer(**values | changed)


def test_figures_of_an_answer():
    given = answer()
    assert (given.tokens_per_second, given.acceptance_rate, given.tokens_per_round) == (2.0, 0.75, 1.5)
    without = answer(generation=generation(drafted=[0], accepted=[0]))
    assert without.acceptance_rate is None


@pytest.mark.parametrize(
    ("mode", "selection", "sizes"),
    [("rapid", SELECTION, (100, 20)), ("retrieval", SELECTION, (20, 0)), ("target", None, (100, 0))],
)
def test_which_model_read_which_prompt(mode, selection, sizes):
    given = answer(mode=mode, reading=reading(selection, truncated=True))
    assert (given.target_tokens, given.draft_tokens) == sizes
    assert (given.document_tokens, given.truncated, given.selection) == (90, True, selection)
    told = given.to_json()
    assert (told["target_tokens"], told["draft_tokens"]) == sizes
    assert (told["document_tokens"], told["truncated"]) == (90, True)


def test_json_is_json_and_says_all_of_it():
    given = json.loads(json.dumps(answer().to_json()))
    assert given["answer"] == "abc" and given["acceptance_rate"] == 0.75
    assert given["retrieval"] == {
        "chunks": [{"start": 3, "end": 9, "tokens": 2}],
        "considered": 4,
        "kept": 1,
        "tokens": 2,
        "scores": [0.5],
        "fallback": False,
    }
    assert given["rounds_by_gamma"] == {"4": 2}
    assert json.loads(json.dumps(answer(reading=reading(None)).to_json()))["retrieval"] is None
