# SPDX-License-Identifier: Apache-2.0
"""A tiny random chat model, saved by transformers as users' folders are, and documents for it."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.retrieval.encoders import WORDS

MAX_POSITIONS = 2048
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(corpus: list[str]) -> Tokenizer:
    """Byte-level BPE: a rare character is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def tokenizer_files(corpus: list[str]) -> dict[str, bytes]:
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = byte_tokenizer(corpus)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def save_decoder(
    folder: Path, *, seed: int = 0, corpus: list[str] | None = None, sizes: Mapping[str, int] | None = None
) -> Path:
    """A model of two layers; another seed is another model, another corpus another vocabulary.

    `sizes` are keys of its config.json that are to be otherwise.
    """
    torch.manual_seed(seed)
    given = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.25,  # far from uniform distributions
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    config = LlamaConfig(**given | dict(sizes or {}))
    LlamaForCausalLM(config).save_pretrained(folder)
    for name, content in tokenizer_files(corpus or [" ".join(WORDS), "the text and the question"]).items():
        (folder / name).write_bytes(content)
    return folder


def words(count: int, seed: int = 0) -> str:
    """A document of `count` words that the tiny encoders know, in paragraphs of ten."""
    generator = random.Random(seed)
    lines = [" ".join(generator.choices(WORDS, k=min(10, count - at))) for at in range(0, count, 10)]
    return "\n\n".join(lines)
