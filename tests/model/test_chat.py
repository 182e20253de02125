# SPDX-License-Identifier: Apache-2.0
"""Chat templates as somebody else's programs: what they render, what is refused in one line, and what ends them."""

import time

import pytest
import transformers

from longpo_jax.dialogue import Dialogue
from rapid_jax.model import chat
from rapid_jax.model.chat import ChatTemplate, split_at_marks
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import frame, message
from rapid_jax.runtime.errors import InputError
from tests.model.test_tokenizer import byte_level_files, saved
from tests.model.tokenizer_kinds import CHATML

MESSAGES = [{"role": "user", "content": " Who?\n"}, {"role": "assistant", "content": "the cat"}]


def rendered(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, True, None)


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages[0].content.strip().ljust(9, '.') ~ '%5d|{:>4}'.format(3) % 7 }}",
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}{{ 'ab' * 3 }}",
        "{{ bos_token }}{{ nothing }}{{ tools is none }}{{ tools is defined }}{{ add_generation_prompt }}",
        "{{ messages | map(attribute='role') | join(',') }}{{ range(5) | list }}{{ 2 ** 10 }}{{ dict(a=1) }}",
    ],
)
def test_what_transformers_renders(source, tmp_path):
    files = byte_level_files(chat_template=source)
    theirs = transformers.AutoTokenizer.from_pretrained(saved(files, tmp_path))
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(files).chat(MESSAGES) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError: integer division"),
        ("{{ x + 5 }}", "'x' is undefined"),
        ("{{ tools | length }}", "TypeError: object of type 'NoneType'"),
        ("{% include 'other' %}", "no loader"),
        ("{% extends 'other' %}", "no loader"),
        ("{% import 'other' as o %}", "no loader"),
        ("{% break %}", "is not valid: SyntaxError: 'break' outside loop"),
        ("{{ 'a' | nothing }}", "is not valid: No filter named 'nothing'"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ raise_exception('\x1b[31mno\r\nway') }}", r"refused the messages: \?\[31mno way$"),
        ("{{ raise_exception() }}", "TypeError"),
        ("{{ messages[5].content.x }}", "undefined|has no"),
        ("{{ 'a' * 10**9 }}", "MemoryError"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{" + "(" * 5000, "is not valid: "),
        ("{% for i in range(17) %}{{ ('a' * 10**6) }}{% endfor %}", "more than 16777216 characters"),
        ("{{ strftime_now(5) }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_one_line_with_its_words(source, words):
    with pytest.raises(InputError, match=words) as error:
        rendered(source)
    assert str(error.value).startswith("the checkpoint's chat template ") and str(error.value).isprintable()


def test_a_template_that_does_not_end_is_ended_and_the_next_one_is_rendered(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(chat.TemplateLimitError, match=r"takes more than 0\.2 seconds"):
            rendered("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
        assert rendered("{{ messages[1].content }}") == "the cat"
    assert time.monotonic() - begun < 30


def test_a_renderer_that_was_closed_is_started_anew():
    assert rendered("{{ messages[1].content }}") == "the cat"
    chat.RENDERER.close()
    assert rendered("{{ messages[1].content }}") == "the cat"


def test_models_that_may_think_are_told_not_to():
    """As Qwen3's and SmolLM3's templates ask, of which the first thinks unless told otherwise."""
    asked = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"
    assert rendered(asked) == "<think>\n\n</think>"
    asked = "{% if enable_thinking is not defined or enable_thinking %}/think{% else %}/no_think{% endif %}"
    assert rendered(asked) == "/no_think"


def test_parted_needs_every_mark_once_and_in_order():
    assert split_at_marks("a<1>b<2>c", ["<1>", "<2>"]) == ["a", "b", "c"]
    for text in ("a<1>b", "a<2>b<1>", ""):
        with pytest.raises(InputError, match="dropped or changed a message"):
            split_at_marks(text, ["<1>", "<2>"])
    for text in ("a<1>b<2>c<1>", "<2><1><2>"):
        with pytest.raises(InputError, match="wrote a message 2 times"):
            split_at_marks(text, ["<1>", "<2>"])


TWICE = "{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}"
LATER = "{% for m in messages %}{{ m.content }}|{% endfor %}{{ messages[0].content }}"
UPPER = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
HALF = "{% for m in messages %}{{ m.content[:30] }}{% endfor %}"
NONE = "{% for m in messages %}{{ m.role }}{% endfor %}"


CHANGED = [
    CHATML.replace("m.content", f"m.content{change}")
    for change in (
        " | e",
        " | lower",
        " | tojson",
        " | replace('\n', ' ')",
        ".split() | join(' ')",
        " | indent(2)",
    )
]


@pytest.mark.parametrize("source", [TWICE, LATER, UPPER, HALF, NONE, "", *CHANGED])
def test_a_template_that_does_not_write_each_message_once_is_refused(source):
    tokenizer = Tokenizer(byte_level_files(chat_template=source))
    for prompt in (
        lambda: frame(tokenizer, "Read {document} {question}", "Who?", None),
        lambda: message(tokenizer, "Who?", None),
        lambda: Dialogue(tokenizer, ["Who?"]),
        lambda: Dialogue(tokenizer, ["Who?", "Why?"]),
    ):
        with pytest.raises(InputError, match=r"chat template (dropped or changed|wrote) a message"):
            prompt()


@pytest.mark.parametrize("strip", ["", " | trim", ".strip()"])
@pytest.mark.parametrize(
    "template", ["{document}\n\n{question}", " {document} : {question}!", "x {document}{question}\n"]
)
def test_space_around_a_message_is_as_transformers_renders_it(strip, template, tmp_path):
    files = byte_level_files(chat_template=CHATML.replace("m.content", f"m.content{strip}"))
    ours, theirs = Tokenizer(files), transformers.AutoTokenizer.from_pretrained(saved(files, tmp_path))
    document, question = "\n  the cat ", "Who? \n"
    content = template.replace("{document}", document).replace("{question}", question)
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    prompt = frame(ours, template, question, None).around(document)
    assert ours.decode(prompt.tokens, skip_special_tokens=False) == "<s>" + expected
    alone = theirs.apply_chat_template(
        [{"role": "user", "content": " a \n"}], tokenize=False, add_generation_prompt=True
    )
    assert ours.decode(message(ours, " a \n", None), skip_special_tokens=False) == "<s>" + alone
