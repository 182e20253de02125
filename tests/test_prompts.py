# SPDX-License-Identifier: Apache-2.0
"""Prompts around a document, and what is left of a document that is too long."""

import pytest

from rapid_jax.config import ModelsConfig, PromptsConfig
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import frame, visible_text
from rapid_jax.runtime.errors import InputError
from tests.tiny_models import tokenizer_files, words

TEMPLATE = "Read this:\n{document}\nand say: {question}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_files(["the text and the question w1 w2 w3"]))


def test_a_prompt_is_the_chat_text_with_document_and_question_in_place(tokenizer):
    prompt = frame(tokenizer, TEMPLATE, "Who {document}?", "Be brief.").around("The text.")
    text = tokenizer.decode(prompt.tokens, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nRead this:\nThe text.\nand say: Who {document}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.head, skip_special_tokens=False).endswith("Read this:\nThe text.")


def test_the_head_depends_on_the_document_alone(tokenizer):
    first, second = (frame(tokenizer, TEMPLATE, question, None).around("The text.") for question in ("Who?", "Why so?"))
    assert first.head == second.head and first.tail != second.tail
    around = frame(tokenizer, TEMPLATE, "Who?", None)
    assert around.size == len(first.tokens) - len(tokenizer.encode("The text."))


def gemma(refuses: bool) -> Tokenizer:
    """A template without a system role: its text goes before the first question, or is refused."""
    system = (
        "{{ raise_exception('System role not supported') }}" if refuses else "{% set prefix = m.content + '\n\n' %}"
    )
    template = (
        "{{ bos_token }}{% set prefix = '' %}{% set messages = messages %}"
        "{% if messages[0].role == 'system' %}"
        + system.replace("m.content", "messages[0].content")
        + "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ prefix if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return Tokenizer(tokenizer_files(["the text"]) | {"chat_template.jinja": template.encode()})


def test_without_a_system_role_its_text_begins_the_first_question_or_the_template_says_why_not():
    tokenizer = gemma(refuses=False)
    turns = (("Who?", "He."),)
    prompt = frame(tokenizer, TEMPLATE, " Why? ", "Be brief.", turns=turns).around("The text.")
    assert tokenizer.decode(prompt.tokens, skip_special_tokens=False).removeprefix("<s>") == (
        "<start_of_turn>user\nBe brief.\n\nRead this:\nThe text.\nand say: Who?<end_of_turn>\n"
        "<start_of_turn>model\nHe.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert frame(gemma(refuses=True), TEMPLATE, "Who?", None).size
    with pytest.raises(InputError, match=r"^the checkpoint's chat template refused the messages: System role not supp"):
        frame(gemma(refuses=True), TEMPLATE, "Who?", "Be brief.")


def test_thinking_is_asked_for_by_the_template():
    ends = (
        b"{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' if enable_thinking else '<think></think>' }}"
    )
    tokenizer = Tokenizer(tokenizer_files(["the text"]) | {"chat_template.jinja": ends})
    for thinking, end in ((True, "<think>"), (False, "<think></think>")):
        prompt = frame(tokenizer, TEMPLATE, "Who?", None, thinking=thinking).around("The text.")
        assert tokenizer.decode(prompt.tokens).endswith(f"and say: Who?{end}")


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(question, tokenizer):
    with pytest.raises(InputError, match="expected a question"):
        frame(tokenizer, TEMPLATE, question, None)


def test_a_chat_template_that_drops_the_message_is_refused():
    files = tokenizer_files(["x"]) | {"chat_template.jinja": b"{{ 'Hello' }}"}
    with pytest.raises(InputError, match="dropped or changed a message"):
        frame(Tokenizer(files), TEMPLATE, "Who?", None)


@pytest.mark.parametrize(
    "content",
    [
        "content | truncate(60)",
        "content[:50]",
        "content.split('</think>')[-1]",
        "content | replace('w7', '')",
        "'LONG' if content | length > 200 else content",
        "content.rstrip('?')",
    ],
)
def test_a_chat_template_that_looks_at_what_a_message_says_is_refused(content):
    """Shown marks alone it writes them as they are; shown the document it writes another text."""
    template = (
        "{% for message in messages %}{% set content = message.content %}<|im_start|>{{ " + content + " }}{% endfor %}"
    )
    files = tokenizer_files([words(20)]) | {"chat_template.jinja": template.encode()}
    with pytest.raises(InputError, match=r"chat template (changes|dropped or changed) a message"):
        frame(Tokenizer(files), TEMPLATE, "Who?", None).around("</think>" + words(90))
    plain = tokenizer_files([words(20)]) | {"chat_template.jinja": template.replace(content, "content").encode()}
    frame(Tokenizer(plain), TEMPLATE, "Who?", None).around("</think>" + words(90))


@pytest.mark.parametrize("too_long", ["error", "head", "middle"])
def test_a_document_that_fits_is_left_alone(too_long, tokenizer):
    document = words(60)
    size = len(tokenizer.encode(document))
    assert visible_text(document, size, tokenizer, too_long, 10) == (document, size)


def test_a_document_that_does_not_fit_is_refused_with_both_numbers(tokenizer):
    document = words(60)
    size = len(tokenizer.encode(document))
    with pytest.raises(InputError, match=f"at most {size - 1} tokens .*, got {size}; models.too_long"):
        visible_text(document, size - 1, tokenizer, "error", size)


def test_head_keeps_the_beginning_and_middle_both_ends(tokenizer):
    document = words(200)
    size = len(tokenizer.encode(document))
    head, whole = visible_text(document, 200, tokenizer, "head", 100)
    assert whole == size and document.startswith(head) and len(tokenizer.encode(head)) == 100
    middle, whole = visible_text(document, 101, tokenizer, "middle", 1000)
    ends = tokenizer.encode(document)
    assert whole == size
    assert tokenizer.decode(ends[:51]) + tokenizer.decode(ends[-50:]) == middle


def test_a_cut_through_a_character_of_several_tokens_still_fits(tokenizer):
    document = "\U0001f600\u65e5\u672c" * 40
    for room in range(1, 40):
        try:
            text, _ = visible_text(document, room, tokenizer, "head", room)
        except InputError as error:
            assert "no part of the document fits" in str(error) and room < 4
            continue
        assert text and document.startswith(text) and len(tokenizer.encode(text)) <= room


def test_no_room_and_no_text_are_refused(tokenizer):
    with pytest.raises(InputError, match="no room for a document: 4 tokens too many"):
        visible_text("text", -3, tokenizer, "head", 10)
    with pytest.raises(InputError, match="got an empty one"):
        visible_text(" \n", 100, tokenizer, "head", 10)


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "{document} alone"},
        {"drafter": "{question} then {document}"},
        {"target": "{document} {document} {question}"},
    ],
)
def test_a_template_without_its_places_is_refused(settings):
    with pytest.raises(InputError, match=rf"prompts\.{next(iter(settings))}"):
        PromptsConfig(**settings)


def test_the_context_size_is_positive():
    with pytest.raises(InputError, match=r"models\.max_context: expected at least 1, got 0"):
        ModelsConfig(max_context=0)
