# SPDX-License-Identifier: Apache-2.0
"""Counting a sample's tokens as an evaluation does, with a tiny byte-level tokenizer or any other."""

from collections import Counter

from rapid_jax.evaluate.samples import Sample
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import frame
from tests.tiny_models import tokenizer_files

CORPUS = ["The value of the number is that of the text, and the words of the list stand in it as often as others."]


class Counting:
    """A Measure that knows how often each sample, by its id, was counted."""

    def __init__(self, tokenizer: Tokenizer | None = None):
        self.tokenizer = tokenizer or Tokenizer(tokenizer_files(CORPUS))
        self.counted: Counter[str] = Counter()

    def __call__(self, sample: Sample) -> int:
        self.counted[sample.id] += 1
        template = sample.template or "{document}\n\n{question}"
        prompt = frame(self.tokenizer, template, sample.question, None).around(sample.document)
        return len(prompt.tokens) + len(self.tokenizer.encode_quoted(sample.begins)) + sample.max_new_tokens

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode_quoted(text))

    def share_before(self, sample: Sample, text: str) -> float:
        """The share of the other tokens of the document that stand before `text`."""
        before, _, after = sample.document.partition(text)
        return self.tokens(before) / max(self.tokens(before) + self.tokens(after), 1)
