# SPDX-License-Identifier: Apache-2.0
"""Whatever a document spells, by whatever tokenizer: no token of it controls the model, and it decodes to its text."""

import json
import random

import pytest

from longpo_jax.dialogue import Dialogue
from longpo_jax.records import Answer
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import frame, message
from rapid_jax.runtime.errors import InputError
from tests.model.test_tokenizer import byte_level_files
from tests.model.tokenizer_kinds import CHATML, INST, changed, kinds, unigram, word_level

KINDS = kinds()
MARKERS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
PARTS = (*MARKERS, "<unk>", "</", "s>", "/s>", "<|im", "_end|>", " ", "  ", "\n", "the", " cat", "\u00e9", "user\n")


def controlling(tokenizer: Tokenizer) -> set[int]:
    """Found apart from the tokenizer's own sets: by spelling, and what ends an answer."""
    found = {id for token in MARKERS if (id := tokenizer.id_of(token)) is not None}
    return found | set(tokenizer.stop_ids)


def hostile(rng: random.Random) -> str:
    text = "".join(rng.choices(PARTS, k=rng.randint(1, 6)))
    return text if text.strip() else "cat"


@pytest.fixture(params=KINDS)
def tokenizer(request) -> Tokenizer:
    return Tokenizer(KINDS[request.param])


def test_no_token_of_a_hostile_document_controls_the_model(tokenizer, request):
    rng, controls = random.Random(0), controlling(tokenizer)
    files = tokenizer.files["tokenizer.json"]
    exact = files != KINDS["words"]["tokenizer.json"]  # which drops spaces anyway
    first = " " if files == KINDS["unigram"]["tokenizer.json"] else ""  # it has one space for a text's first and none
    sound = 0
    for _ in range(90 * request.config.getoption("--fuzz")):
        text = hostile(rng)
        try:
            ids = tokenizer.encode_quoted(text)
        except InputError as error:
            assert "\n" not in str(error) and not exact
            continue
        sound += 1
        assert not controls & set(ids), text
        assert len(ids) == len(tokenizer.spans(text)) == tokenizer.counts([text])[0]
        follows = tokenizer.encode_quoted(text, follows=True)
        assert not controls & set(follows)
        if exact:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text.removeprefix(first)
    assert sound > 30


def test_prompts_and_dialogues_have_the_controlling_tokens_of_plain_words(tokenizer):
    rng, controls = random.Random(1), controlling(tokenizer)

    def shape(tokens):
        return [token for token in tokens if token in controls]

    def all_of(text):
        prompt = frame(tokenizer, "Read {document} and say {question}", text, None).around(text).tokens
        dialogue = Dialogue(tokenizer, [text, text])
        answers = [Answer(text, 1, True)] * 2
        whole = dialogue.shared(text) + dialogue.branch(answers).tokens
        return shape(prompt), shape(message(tokenizer, text, None)), shape(whole)

    plain, sound = all_of("the cat"), 0
    for _ in range(8):
        text = hostile(rng)
        try:
            assert all_of(text) == plain, text
        except InputError as error:
            assert "controls the model" in str(error)
            continue
        sound += 1
    assert sound


def test_plain_text_has_the_tokens_that_it_always_had(tokenizer):
    for text in ("the cat sat on the mat", "a < b/s > c", "im_end s> </ user"):
        assert tokenizer.encode_quoted(text) == tokenizer.encode(text)


def test_the_places_of_tokens_are_those_of_the_text():
    tokenizer = Tokenizer(KINDS["merges that spell them"])
    text = "the cat</s> sat</s>"
    assert tokenizer.id_of("</s>") in tokenizer.encode("x</s>")
    spans = tokenizer.spans(text)
    assert set().union(*(range(start, end) for start, end in spans)) == set(range(len(text)))
    assert "".join(text[start:end] for start, end in spans) == text


def test_a_token_that_ends_answers_by_its_id_alone_is_not_spelt_either():
    files = unigram()
    ours = Tokenizer({"tokenizer.json": files["tokenizer.json"]}, 2)
    assert ours.stop_ids == (2,) and 2 in ours.encode("a</s>")
    assert 2 not in ours.encode_quoted("a</s>") and ours.decode(ours.encode_quoted("a</s>")) == "a</s>"


def test_a_part_that_only_a_controlling_token_can_write_is_refused():
    with pytest.raises(InputError, match=r"'</s>' at character 4.*only '</s>'"):
        Tokenizer(word_level()).encode_quoted("the </s> cat")
    letter = Tokenizer(byte_level_files())
    stopped = Tokenizer(byte_level_files(), letter.id_of("z"))
    with pytest.raises(InputError, match="'z' at character 1"):
        stopped.encode_quoted("azb")
    settings = json.loads(word_level()["tokenizer.json"])["model"] | {"unk_token": "</s>"}
    unknown = Tokenizer(changed(word_level(), model=settings))
    with pytest.raises(InputError, match="'dog' at character 4"):
        unknown.encode_quoted("the dog")


def test_unknown_words_are_unknown_and_no_refusal():
    ours = Tokenizer(word_level())
    assert ours.encode_quoted("the dog <unk> cat") == [3, 0, 0, 4]
    spelt = Tokenizer(unigram())
    assert spelt.decode(spelt.encode_quoted("a<unk>b"), skip_special_tokens=False) == "a<unk>b"


def test_added_tokens_that_control_nothing_stay_tokens():
    files = changed(byte_level_files(chat_template=CHATML))
    settings = json.loads(files["tokenizer_config.json"])
    plain = {"content": "<table>", "special": False}
    top = Tokenizer(files).vocab_size
    settings["added_tokens_decoder"] = {str(top): plain}
    ours = Tokenizer(files | {"tokenizer_config.json": json.dumps(settings).encode()})
    assert ours.encode_quoted("a<table>") == [*ours.encode("a"), top]
    settings["chat_template"] = "{% if tools %}<table>{% endif %}" + INST
    written = Tokenizer(files | {"tokenizer_config.json": json.dumps(settings).encode()})
    assert top not in written.encode_quoted("a<table>")


def test_half_a_surrogate_pair_is_refused_with_its_place():
    tokenizer = Tokenizer(KINDS["byte-level"])
    for text in ("caf\udce9?", "caf\ud800"):
        for take in (tokenizer.encode, tokenizer.encode_quoted, tokenizer.spans, tokenizer.encode_template):
            with pytest.raises(InputError, match=r"half of a surrogate pair, at character 3"):
                take(text)
        with pytest.raises(InputError, match="half of a surrogate pair"):
            tokenizer.counts(["fine", text])
        with pytest.raises(InputError, match=r"the question: .* at character 3"):
            frame(tokenizer, "{document} {question}", text, None)
