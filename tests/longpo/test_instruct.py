# SPDX-License-Identifier: Apache-2.0
"""Questions are found in whatever form a model numbers them, and a number inside one does not split it."""

import time
from collections import Counter

import pytest

from longpo_jax.config import InstructConfig
from longpo_jax.instruct import OPENERS, drawn, parsed, request

CONFIG = InstructConfig()
QUESTIONS = ["How does X relate to Y?", "Why is Z?", "What if W?", "Compare A and B."]


@pytest.mark.parametrize(
    "form",
    [
        "{n}: {q}",
        "{n}: {n}. {q}",
        "{n}. {q}",
        "{n}) {q}",
        "({n}) {q}",
        "{n} - {q}",
        "{n}.{q}",
        "**{n}.** {q}",
        "**{n}. {q}**",
        "{n}. **{q}**",
        "**{n}:** *{q}*",
        "Question {n}: {q}",
        "**Question {n}:** {q}",
        "### Question {n}\n{q}",
        "Question {n}\n\n{q}\n",
        "Q{n}. {q}",
        "- {n}: {q}",
        "  {n}: {q}\n\n",
        '{n}: "{q}"',
        "> {n}: {q}",
    ],
)
def test_numbers_of_every_form_are_read(form):
    said = "\n".join(form.format(n=n, q=q) for n, q in enumerate(QUESTIONS, 1))
    assert parsed(said, CONFIG) == QUESTIONS
    assert parsed(f"Here are 4 questions:\n\n{said}\n\nThese cover the whole passage.", CONFIG) == QUESTIONS


@pytest.mark.parametrize(
    ("said", "first"),
    [  # specification O10: the official parser splits the first two
        (
            "1: How did policy change in 1999. and after?\n2: Why?\n3: What?\n4: Who?",
            "How did policy change in 1999. and after?",
        ),
        ("1. **What is the role of section 3.2?**\n2. Why?\n3. What?\n4. Who?", "What is the role of section 3.2?"),
        ("Here are 4 questions:\n1: A?\n2: B?\n3: C?\n4: D?", "A?"),
        (
            "1: What changed between version\n2.1 and 3: the last?\n2: B?\n3: C?\n4: D?",
            "What changed between version 2.1 and 3: the last?",
        ),
        (
            "1: Is chapter 2. better than chapter 3: why?\n2: B?\n3: C?\n4: D?",
            "Is chapter 2. better than chapter 3: why?",
        ),
        ("1: Was it so in\n1999. Or later?\n2: B?\n3: C?\n4: D?", "Was it so in 1999. Or later?"),
        ("1: What does `x**2` mean?\n2: B?\n3: C?\n4: D?", "What does `x**2` mean?"),
    ],
)
def test_numbers_inside_a_question_do_not_split_it(said, first):
    found = parsed(said, CONFIG)
    assert found[0] == first and len(found) == 4


@pytest.mark.parametrize(
    "said",
    [
        "1: Is A? 2: Is B? 3: Is C? 4: Is D?",
        "Sure! Here they are: 1. Is A? 2. Is B? 3. Is C? 4. Is D?",
        "1) Is A?  **2)** Is B?\n3) Is C? 4) Is D?",
        "1. Is A?\n1. Is B?\n1. Is C?\n1. Is D?",
        "- Is A?\n- Is B?\n* Is C?\n\u2022 Is D?",
        "These are four questions.\nIs A?\n\nIs B?\nI hope they help.\nIs C?\nIs D?",
        "Is A? Is B? Is C? Is D?",
        "5: Is A?\n6: Is B?\n7: Is C?\n8: Is D?",
    ],
)
def test_one_line_no_numbers_and_wrong_numbers(said):
    assert parsed(said, CONFIG) == ["Is A?", "Is B?", "Is C?", "Is D?"]


def test_a_question_of_several_lines_is_one_and_an_answer_to_it_is_left_out():
    said = (
        "1: Think of the voyage.\n   How does it end?\nAnswer: badly.\n"
        "2: **Fate**\n\nWho decides?\n\nA: nobody.\n3: Why?\n   - for whom?\n4: Who?\n\nDo these help?"
    )
    assert parsed(said, CONFIG) == [
        "Think of the voyage. How does it end?",
        "Fate Who decides?",
        "Why?",
        "Who?",
    ]


def test_an_answer_without_a_word_for_it_is_left_out_too():
    said = "\n\n".join(f"Question {n}:\nIs it {n}?\nThe answer is that it is {n}." for n in range(1, 5))
    assert parsed(said, CONFIG) == ["Is it 1?", "Is it 2?", "Is it 3?", "Is it 4?"]


def test_a_last_question_that_breaks_off_is_left_out():
    assert parsed("1: Is A?\n2: Compare B.\n3: What is the sour", CONFIG) == ["Is A?", "Compare B."]
    assert parsed("1: Compare A\n2: Is B?\n3: Compare C", CONFIG) == ["Compare A", "Is B?", "Compare C"]
    assert parsed("1: Is A? 2: Is B? 3: What is the sour", CONFIG) == ["Is A?", "Is B?"]


def test_doubles_and_empty_ones_go_and_order_stays():
    said = "1: Why?\n2: How so?\n3: why ?\n4:\n5: **\n6: Who?"
    assert parsed(said, InstructConfig(questions=6, at_least=1)) == ["Why?", "How so?", "Who?"]


def test_no_more_than_asked_for_and_fewer_as_found():
    said = "\n".join(f"{n}: Question about matter {n}0?" for n in range(1, 8))
    assert parsed(said, CONFIG) == [f"Question about matter {n}0?" for n in range(1, 5)]
    assert parsed("1: Why?\n2: Who?", CONFIG) == ["Why?", "Who?"]
    assert parsed("I have read the text. It is about whales.", CONFIG) == []
    assert parsed("", CONFIG) == []


@pytest.mark.parametrize(
    "said",
    [  # of SmolLM2-135M, asked for four questions about excerpts of a manual
        "Based on the above response, I will use your answer to generate a list of questions that can be asked to a "
        "reader to identify what they are reading.",
        "This is a list of 15-25. This list contains 15-25. A list contains 15-25 elements.\n\n#[derive(Debug)]\n"
        "enum List {\n    Cons(i32, RefCell<Rc<List>>),\n    Nil,\n}\n",
        "[Dockerfile]\n```\n[Dockerfile]\n# 1.2.1\n#\n# \n# \n#\n",
    ],
)
def test_remarks_and_code_in_the_place_of_questions_are_none(said):
    assert parsed(said, CONFIG) == []


@pytest.mark.parametrize(
    "run", ["-", "*", " ", "\n", "1. ", "1", "Q", "a ", ":", "> ", "#", "? ", "1 \n", "a" + " " * 50]
)
def test_a_model_that_loops_is_read_in_no_time(run):
    start = time.monotonic()
    parsed("1: a" + run * (20000 // len(run)) + "!", CONFIG)
    assert time.monotonic() - start < 2


def test_openers_and_questions_are_drawn_uniformly_from_the_seed():
    assert len(set(OPENERS)) == len(OPENERS) == 20
    assert all(opener.endswith(",") and opener == opener.strip() for opener in OPENERS)
    pairs = [drawn(QUESTIONS, seed) for seed in range(4000)]
    assert pairs[:50] == [drawn(QUESTIONS, seed) for seed in range(50)]
    counts = Counter(pairs)
    assert len(counts) == 80
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 130  # chi-square, 79 degrees: p = 0.0003


def test_the_request_names_the_number_of_questions():
    words = request(InstructConfig(questions=7, at_least=3))
    assert words.count("7") == 2 and "4" not in words


def test_a_number_alone_is_no_question():
    assert parsed("1: 2\n2: 3.5?\n3: Why is it 2?", InstructConfig(questions=3, at_least=1)) == ["Why is it 2?"]
