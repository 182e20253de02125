# SPDX-License-Identifier: Apache-2.0
"""The rules for leaving out pairs give the oracle's numbers (specification O10) and the plain algorithms' answers."""

import random

import pytest

from longpo_jax.config import PairsConfig
from longpo_jax.filters import REFUSALS, reason_to_drop, repeat_share, repeats_itself

GOOD = "The whale sinks the ship, and only one sailor survives."
OTHER = "A sailor named Ishmael tells how the voyage ended."


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("the cat sat on the mat and the dog ran", 0.3),
        ("no no no no no no no no no yes", 0.9),
        ("again and again " * 20, 1.0),
        ("I do.", 0.0),
        ("The, the; THE cat!", 0.75),
        ("?!", 0.0),
        ("", 0.0),
    ],
)
def test_the_share_of_repeated_words(text, share):
    assert repeat_share(text) == pytest.approx(share, abs=1e-12)


def kmp(text: str, times: int = 3) -> bool:
    """The official rule, with the prefix function."""
    if len(text) <= 1:
        return False
    prefix, k = [0] * len(text), 0
    for i in range(1, len(text)):
        while k and text[k] != text[i]:
            k = prefix[k - 1]
        k += text[k] == text[i]
        prefix[i] = k
    unit = len(text) - prefix[-1]
    return prefix[-1] != 0 and len(text) % unit == 0 and len(text) // unit >= times


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("abab", False),
        ("ababab", True),
        ("abc abc abc ", True),
        ("abcabcabcab", False),
        ("aaa", True),
        ("abc abc\nabc", True),  # ours: word by word
        ("abc abc", False),
        ("", False),
    ],
)
def test_one_unit_three_times(text, repeats):
    assert repeats_itself(text) == repeats


def test_a_text_without_spaces_repeats_as_the_prefix_function_says():
    generator = random.Random(0)
    texts = ["".join(generator.choices("ab", k=generator.randint(1, 4))) * generator.randint(1, 5) for _ in range(300)]
    texts += ["".join(generator.choices("ab", k=generator.randint(1, 9))) for _ in range(300)]
    assert [repeats_itself(text) for text in texts] == [kmp(text) for text in texts]
    assert 100 < sum(kmp(text) for text in texts) < 500


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (GOOD, OTHER, None),
        ("", OTHER, "empty"),
        (GOOD, " \n", "empty"),
        (f"As an AI language model, {OTHER}", GOOD, "refusal"),
        (GOOD, "I\u2019m  unable\nto say, the text is long.", "refusal"),
        ("again and again " * 20, GOOD, "repetitive chosen"),
        (GOOD, "again and again " * 20, "repetitive rejected"),
        (GOOD, "ha ha ha", "repetitive rejected"),
        ("I do.", GOOD, "too few words"),
        (GOOD, "It is so: 12, 13.", "too few words"),
        (GOOD, f" {GOOD.replace(', ', ',  ')}\n", "identical answers"),
        (GOOD, GOOD.replace("one", "1"), None),
    ],
)
def test_the_reason_to_drop_a_pair(chosen, rejected, reason):
    assert reason_to_drop(chosen, rejected, PairsConfig()) == reason


def test_shares_at_a_limit_pass_and_chosen_answers_are_held_to_the_stricter_one():
    words = [f"word{index}" for index in range(10)]
    exactly = " ".join(["same"] * 90 + words)  # 0.90
    above = " ".join(["same"] * 190 + words)  # 0.95
    config = PairsConfig()
    assert (repeat_share(exactly), repeat_share(above)) == (0.9, 0.95)
    assert reason_to_drop(exactly, GOOD, config) is None
    assert reason_to_drop(above, GOOD, config) == "repetitive chosen"
    assert reason_to_drop(GOOD, above, config) is None
    assert reason_to_drop(GOOD, f"same {above}", config) == "repetitive rejected"


def test_thresholds_are_the_config_s():
    assert reason_to_drop("the cat and the dog", OTHER, PairsConfig(repeats_chosen=0.3)) == "repetitive chosen"
    assert reason_to_drop("\u9cb8\u9c7c\u6c89\u8239\u3002", "\u6c34\u624b\u3002", PairsConfig(min_words=0)) is None
    assert reason_to_drop(GOOD, OTHER, PairsConfig(min_words=9)) == "too few words"


def test_every_refusal_is_found_in_any_case():
    assert len(set(REFUSALS)) == len(REFUSALS) == 37
    for phrase in REFUSALS:
        assert reason_to_drop(GOOD, f"Well. {phrase.upper()} that.", PairsConfig()) == "refusal"
