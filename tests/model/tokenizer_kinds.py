# SPDX-License-Identifier: Apache-2.0
"""Tokenizers in which a document could spell the tokens that end a turn: one of each way to come to such a token."""

import json
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tests.model.test_tokenizer import byte_level_files, sentencepiece_files

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"


def changed(files: dict[str, bytes], **parts: Any) -> dict[str, bytes]:
    """The files with other parts of tokenizer.json."""
    settings = json.loads(files["tokenizer.json"]) | parts
    return files | {"tokenizer.json": json.dumps(settings).encode()}


def with_flags(files: dict[str, bytes], **flags: bool) -> dict[str, bytes]:
    """The files with other flags of every added token."""
    return changed(files, added_tokens=[token | flags for token in json.loads(files["tokenizer.json"])["added_tokens"]])


def merging(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with merges that spell </s> and <|im_end|>, in a pre-tokenizer that keeps a text whole."""
    model = json.loads(files["tokenizer.json"])["model"]
    for left, right in (("<", "/"), ("s", ">"), ("</", "s>"), ("<", "|"), ("|", ">"), ("<|", "im"), ("_end", "|>")):
        for part in (left, right):
            while part not in model["vocab"]:  # from its characters
                size = next(size for size in range(len(part), 0, -1) if part[:size] in model["vocab"])
                made = part[: size + 1]
                model["vocab"][made] = len(model["vocab"])
                model["merges"].append([made[:-1], made[-1]])
        model["vocab"].setdefault(left + right, len(model["vocab"]))
        model["merges"].append([left, right])
    model["merges"].append(["<|im", "_end|>"])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return changed(files, model=model, pre_tokenizer=level)


def markers_in_the_vocabulary() -> dict[str, bytes]:
    """ChatML's tokens are words of the vocabulary, and no list of added tokens has them."""
    files = byte_level_files(chat_template=CHATML)
    settings = json.loads(files["tokenizer.json"])
    added = [token for token in settings["added_tokens"] if "im_" not in token["content"]]
    cut = {"type": "Split", "pattern": {"Regex": r"<\|im_\w+\|>|\s|\w+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = settings["model"] | {"ignore_merges": True}
    return changed(
        files, added_tokens=added, model=model, pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, level]}
    )


def taking_words_whole() -> dict[str, bytes]:
    files = byte_level_files(chat_template=INST)
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = json.loads(files["tokenizer.json"])["model"] | {"ignore_merges": True}
    return changed(files, model=model, pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, level]})


def _built(backend: Backend) -> dict[str, bytes]:
    settings = {"chat_template": INST, "bos_token": "<s>", "eos_token": "</s>"}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def unigram() -> dict[str, bytes]:
    pieces = [("<unk>", 0.0), ("<s>", -5.0), ("</s>", -1.0)]
    pieces += [(char, -6.0) for char in (*map(chr, range(33, 127)), "\u2581", "\n", "\u00e9")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _built(backend)


def word_level() -> dict[str, bytes]:
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "cat": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _built(backend)


def kinds() -> dict[str, dict[str, bytes]]:
    """The files of each kind by name."""
    ordinary = byte_level_files(chat_template=CHATML)
    return {
        "byte-level": ordinary,
        "sentencepiece": sentencepiece_files(),
        "markers that are not special": with_flags(ordinary, special=False),
        "tokens that swallow spaces": with_flags(ordinary, lstrip=True, rstrip=True, normalized=True, special=False),
        "merges that spell them": merging(byte_level_files(chat_template=INST)),
        "merges that spell the template's": merging(with_flags(ordinary, special=False)),
        "markers that are no added tokens": markers_in_the_vocabulary(),
        "whole words": taking_words_whole(),
        "unigram": unigram(),
        "words": word_level(),
    }
