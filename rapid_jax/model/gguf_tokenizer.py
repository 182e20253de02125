# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file's metadata, as the Hugging Face files that the checkpoint was made from.

GGUF stores the vocabulary and the merges, and names the pre-tokenizer (how text is cut before merges apply) by one word
that llama.cpp knows. Only byte-level BPE with a word of the table below is read: a wrong cut silently gives wrong ids.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rapid_jax.runtime.errors import InputError

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

# A word with its leading character, up to {digits} digits, punctuation with line ends, line ends, other space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Cut:
    """What one word of `tokenizer.ggml.pre` stands for."""

    digits: str | None  # how many digits stay together, as a quantifier; None: GPT-2's own cut, each digit alone
    nfc: bool = False  # text is composed first
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # where the file does not say


_CUTS = {
    "smollm": _Cut(digits=None),
    "llama-bpe": _Cut(digits="{1,3}", ignore_merges=True, add_bos=True),
    "qwen2": _Cut(digits="", nfc=True),
}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json for a GGUF file's metadata.

    Raises InputError naming the tokenizer model or pre-tokenizer when it is not one of those known here.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise InputError(
            f"GGUF tokenizer model {kind!r} is not supported (expected 'gpt2'): use the Hugging Face folder"
        )
    if pre not in _CUTS:
        raise InputError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(_CUTS)}")
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name: tokens[id]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if (id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", _CUTS[pre].add_bos))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        **special,
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    bos = special.get("bos_token") if add_bos else None
    backend = _backend(tokens, metadata, _CUTS[pre], bos)
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(token_ids(metadata), indent=2).encode(),
    }


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list where a turn ends otherwise than a text) and pad_token_id."""
    found = {
        name: metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != found.get("eos_token_id"):
        found["eos_token_id"] = [id for id in (found.get("eos_token_id"), turn) if id is not None]
    return found


def _backend(tokens: list[str], metadata: Mapping[str, Any], cut: _Cut, bos: str | None) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.ignore_merges))  # pyright: ignore[reportArgumentType]
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    if cut.digits is None:
        first, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = pre_tokenizers.Split(Regex(_SPLIT.replace("{digits}", cut.digits)), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    backend.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return backend
