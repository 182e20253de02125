# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers to leave out: the rules of LongPO's data scripts (arXiv 2502.13922), and equality.

Words are what stands between white space, in lower case and without punctuation, as in those scripts. A language that
does not put spaces between words needs pairs.min_words 0.
"""

import re
from collections import Counter

from longpo_jax.config import PairsConfig

# In lower case, with the straight apostrophe.
REFUSALS = (
    "as an ai assistant",
    "as an ai language model",
    "as an ai model",
    "as an artificial intelligence",
    "as a language model",
    "as a large language model",
    "i am an ai",
    "i'm an ai",
    "i'm just a language model",
    "i am just a language model",
    "i am unable to",
    "i'm unable to",
    "i was unable to find",
    "i am not able to",
    "i'm not able to",
    "i cannot answer",
    "i can't answer",
    "i cannot assist",
    "i can't assist",
    "i cannot help with",
    "i can't help with",
    "i cannot provide",
    "i can't provide",
    "i cannot fulfill",
    "i can't fulfill",
    "i do not have access to",
    "i don't have access to",
    "i do not have enough information",
    "i don't have enough information",
    "i'm sorry, but",
    "i am sorry, but",
    "i apologize, but",
    "my knowledge cutoff",
    "my training data",
    "it is not possible to answer",
    "please provide the text",
    "please provide more context",
)


def reason_to_drop(chosen: str, rejected: str, config: PairsConfig) -> str | None:
    """The first reason not to learn from a pair, or None.

    "empty", "refusal", "repetitive chosen", "repetitive rejected", "too few words", "identical answers" (up to white
    space: the pair then has nothing to prefer).
    """
    answers = {"chosen": chosen, "rejected": rejected}
    if not chosen.strip() or not rejected.strip():
        return "empty"
    if any(_refuses(answer) for answer in answers.values()):
        return "refusal"
    limits = {"chosen": config.repeats_chosen, "rejected": config.repeats_rejected}
    for which, answer in answers.items():
        if repeat_share(answer) > limits[which] or repeats_itself(answer):
            return f"repetitive {which}"
    if any(sum(len(word) >= 3 for word in _words(answer)) < config.min_words for answer in answers.values()):
        return "too few words"
    return "identical answers" if chosen.split() == rejected.split() else None


def repeat_share(text: str) -> float:
    """Share of the words that occur more than once, each occurrence counted; 0 without words."""
    words = _words(text)
    return sum(count for count in Counter(words).values() if count > 1) / len(words) if words else 0.0


def repeats_itself(text: str) -> bool:
    """Whether the text is one unit at least three times and nothing else, be it as it stands or word by word."""
    return any(_copies(form) >= 3 for form in (text, " ".join(text.split()) + " "))


def _copies(text: str) -> int:
    """How many times the shortest unit that makes up the text is in it: it is where the text first lies in itself."""
    return len(text) // (text + text).find(text, 1) if text else 0


def _words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def _refuses(answer: str) -> bool:
    plain = " ".join(answer.lower().replace("\u2019", "'").split())
    return any(phrase in plain for phrase in REFUSALS)
