# SPDX-License-Identifier: Apache-2.0
"""What the retrieval tests share: the real MiniLM, a byte-level tokenizer, documents."""

import random
import re
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rapid_jax.retrieval.embed import Embedder


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    return Embedder("minilm")


@pytest.fixture(scope="session")
def word_spans() -> Callable[[str], list[tuple[int, int]]]:
    """Words and punctuation marks; white space is in no token."""
    return lambda text: [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE as the targets have it: the space belongs to the word, a rare character is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["the chunk of a document. it ends, and another begins!\n\n"] * 4 + ["\u65e5\u672c\u8a9e \U0001f600"]
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_spans(byte_tokenizer) -> Callable[[str], list[tuple[int, int]]]:
    return lambda text: byte_tokenizer.encode(text, add_special_tokens=False).offsets


@pytest.fixture(scope="session")
def random_document() -> Callable[[int], str]:
    """A document of a few hundred characters out of everything that is hard to cut; the seed decides it."""
    pieces = ["the ", "chunk", " ", "  ", "\n", "\n\n", "\n \n\n", "\r\n", ". ", "! ", "? ", "; ", ", ", "3.5", "\t"]
    pieces += [
        "\u3002",
        "\uff0c",
        "\u65e5\u672c\u8a9e",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469",
        "e\u0301",
        "\u00e9",
        "\u2028",
        "x" * 40,
        '."\n',
    ]

    def make(seed: int) -> str:
        generator = random.Random(seed)
        return "a" + "".join(generator.choices(pieces, k=generator.randint(1, 120)))

    return make
