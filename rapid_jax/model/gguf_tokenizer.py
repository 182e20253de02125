# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file's metadata, as the Hugging Face files that the checkpoint was made from.

GGUF stores the vocabulary and the merges, and names the pre-tokenizer (how text is cut before merges apply) by one word
that llama.cpp knows. Of byte-level BPE only a word of the table below is read: a wrong cut silently gives wrong ids.
SentencePiece's vocabularies have scores in the place of merges, and no cuts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rapid_jax.model.pieces import CONTROL, UNUSED, USER_DEFINED, Pieces, prepending, tokenizer_json
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, shown

_NAMED = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}  # tokenizer.ggml.*_token_id

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


def tokenizer_files(metadata: Mapping[str, Any], source: str = "GGUF metadata") -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json for a GGUF file's metadata.

    Unused tokens behind all others, with which llama.cpp fills the vocabulary up to the rows of the embedding, are left
    out, as they are in the checkpoint's own files. Raises InputError naming `source` and the key for what is missing,
    of another type, or contradicts another key, and for a tokenizer model or pre-tokenizer that is not known here.
    """
    fields = Fields(metadata, source)
    kind = fields.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"{source}: GGUF tokenizer model {shown(kind)} is not supported (expected 'gpt2' or 'llama'): "
            "use the Hugging Face folder"
        )
    known = ("default",) if kind == "llama" else tuple(_CUTS)
    pre = fields.text("tokenizer.ggml.pre", *known[:1] if kind == "llama" else ())
    if pre not in known:
        raise InputError(f"{source}: GGUF pre-tokenizer {shown(pre)} is not supported; supported: {', '.join(known)}")
    tokens, ids = fields.texts("tokenizer.ggml.tokens"), _named_ids(fields)
    special = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if name in ids}
    add_bos = fields.truth("tokenizer.ggml.add_bos_token", kind == "llama" or _CUTS[pre].add_bos)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.whole(f"{fields.text('general.architecture')}.context_length", least=1),
        **special,
    }
    if (template := fields.text("tokenizer.chat_template", None)) is not None:
        config["chat_template"] = template
    if kind == "llama":
        settings = tokenizer_json(_pieces(fields, tokens, ids), source)
    else:
        settings = json.loads(_backend(fields, tokens, _CUTS[pre], ids).to_str())
    if add_bos and "bos" in ids:
        settings["post_processor"] = prepending(special["bos_token"], ids["bos"])
    return {
        "tokenizer.json": json.dumps(settings).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(token_ids(fields), indent=2).encode(),
    }


def token_ids(fields: Fields) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list where a turn ends otherwise than a text) and pad_token_id."""
    ids = _named_ids(fields)
    found: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    if "eot" in ids and ids["eot"] != ids.get("eos"):
        found["eos_token_id"] = [ids[name] for name in ("eos", "eot") if name in ids]
    return found


def _named_ids(fields: Fields) -> dict[str, int]:
    tokens, found = fields.texts("tokenizer.ggml.tokens"), {}
    for name, key in ((name, f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()):
        if (id := fields.whole(key, None, most=len(tokens) - 1)) is None:
            continue
        if not tokens[id]:
            raise fields.error(key, "the id of a token that is spelt somehow")
        found[name] = id
    return found


def _pieces(fields: Fields, tokens: list[str], ids: Mapping[str, int]) -> Pieces:
    """A SentencePiece vocabulary, and whether a text begins with a space.

    A checkpoint has unused pieces of its own: of those at the end only what is spelt as llama.cpp fills up is left out.
    """
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if fields.get(f"tokenizer.ggml.{key}"):
            raise fields.error(f"tokenizer.ggml.{key}", "false or empty: others are not supported")
    scores, kinds = fields.numbers("tokenizer.ggml.scores"), fields.wholes("tokenizer.ggml.token_type", most=6)
    spaced = fields.truth("tokenizer.ggml.add_space_prefix", True)
    end, named = len(tokens), set(ids.values())
    while kinds[end - 1 : end] == [UNUSED] and tokens[end - 1] == f"[PAD{end - 1}]" and end - 1 not in named:
        end -= 1
    cut = len(tokens) - end
    return Pieces(tokens[:end], scores[: len(scores) - cut], kinds[: len(kinds) - cut], spaced=spaced)


def _backend(fields: Fields, tokens: list[str], cut: _Cut, ids: Mapping[str, int]) -> Tokenizer:
    kinds = fields.wholes("tokenizer.ggml.token_type", most=6)
    if len(kinds) != len(tokens):
        raise InputError(
            f"{fields.source}: tokenizer.ggml.token_type must have {len(tokens)} values, one for each of "
            f"tokenizer.ggml.tokens, got {len(kinds)}"
        )
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocabulary[token] != id)
        raise InputError(f"{fields.source}: tokenizer.ggml.tokens has {shown(twice)} twice")
    merges = _merges(fields, vocabulary)
    needed = {vocabulary[part] for merge in merges for part in (*merge, "".join(merge))} | set(ids.values())
    end = len(tokens)
    while end > 1 and kinds[end - 1] == UNUSED and end - 1 not in needed:
        end -= 1
    vocabulary = {token: id for id, token in enumerate(tokens[:end])}
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
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    return backend


def _merges(fields: Fields, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in fields.texts("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space or any(part not in vocabulary for part in (left, right, left + right)):
            raise InputError(
                f"{fields.source}: tokenizer.ggml.merges must have two tokens and a space between them that make up a "
                f"third, got {shown(merge)}"
            )
        merges.append((left, right))
    return merges
