# SPDX-License-Identifier: Apache-2.0
"""SentencePiece vocabularies as tokenizers of the Rust library, whose ids are those of transformers' conversion.

SentencePiece's BPE joins the two neighbours whose piece has the best score; the library joins by a list of merges. The
merges of a piece are all pairs of pieces that make it up, in the order of the scores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rapid_jax.model.backend import guarded
from rapid_jax.runtime.errors import InputError, extra
from rapid_jax.runtime.json_input import parse_object, shown

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # kinds of pieces, by SentencePiece's and GGUF's numbers
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
_NO_MERGES: Final = {UNKNOWN, CONTROL, BYTE}  # no text is one of these by being spelt so


@dataclass(frozen=True)
class Pieces:
    """A vocabulary, and what is done to a text before it is cut into pieces."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unigram: bool = False  # cut where the sum of scores is largest; else by BPE
    spaced: bool = True  # a text begins with a space
    spaced_again: bool = False  # and so does what follows a special token
    strips: bool = False  # spaces at the ends go, and so do all but one of several
    charsmap: bytes = b""  # rules of Unicode normalisation, compiled


def tokenizer_json(pieces: Pieces, source: str) -> dict[str, Any]:
    """What a tokenizer.json says of such a vocabulary. Raises InputError naming `source` for one that cannot be."""
    if len(pieces.scores) != len(pieces.texts) or len(pieces.kinds) != len(pieces.texts):
        raise InputError(
            f"{source}: expected a score and a kind of each of {len(pieces.texts)} pieces, got {len(pieces.scores)} "
            f"and {len(pieces.kinds)}"
        )
    ids = {text: id for id, text in enumerate(pieces.texts)}
    if len(ids) < len(pieces.texts):
        twice = next(text for id, text in enumerate(pieces.texts) if ids[text] != id)
        raise InputError(f"{source}: its vocabulary has {shown(twice)} twice")
    unknown = [id for id, kind in enumerate(pieces.kinds) if kind == UNKNOWN]
    if not unknown:
        raise InputError(f"{source}: its vocabulary has no piece for what is unknown")
    with guarded(f"{source}: cannot be read"):
        backend = Tokenizer(_model(pieces, ids, unknown[0]))
        backend.normalizer = _normalizer(pieces)  # pyright: ignore[reportAttributeAccessIssue]
        # Of a text whose beginning was stripped the library finds no first part.
        scheme = ("always" if pieces.spaced_again or pieces.strips else "first") if pieces.spaced else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
        ends = [decoders.Strip(content=" ", left=1)] if pieces.spaced else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
        )
        some = [(pieces.texts[id], kind) for id, kind in enumerate(pieces.kinds) if kind in (CONTROL, USER_DEFINED)]
        backend.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL) for text, kind in some])
        return json.loads(backend.to_str())


def prepending(token: str, id: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that begins each text with a token, whatever it is spelt like."""
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def sentencepiece_files(files: Mapping[str, bytes], place: str = "") -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a checkpoint that has tokenizer.model instead; `place` is its folder.

    Special tokens that the config does not name are the model's own; texts begin with bos unless it says otherwise.
    Raises InputError for a file that is no SentencePiece model, or of a kind that has no such files.
    """
    source = f"{place}tokenizer.model"
    proto = _proto(files["tokenizer.model"], source)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE) or trainer.treat_whitespace_as_suffix:
        raise InputError(f"{source}: expected a BPE or a unigram model with spaces before words, others are not read")
    given = parse_object(files.get("tokenizer_config.json", b"{}"), f"{place}tokenizer_config.json")
    pieces = Pieces(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        unigram=trainer.model_type == trainer.UNIGRAM,
        spaced=given.truth("add_prefix_space", rules.add_dummy_prefix),
        spaced_again=given.truth("legacy", False),
        strips=rules.remove_extra_whitespaces,
        charsmap=rules.precompiled_charsmap,
    )
    settings, config = tokenizer_json(pieces, source), dict(given)
    for name in ("bos", "eos", "unk", "pad"):
        id = getattr(trainer, f"{name}_id")
        if 0 <= id < len(pieces.texts):
            config.setdefault(f"{name}_token", pieces.texts[id])
    bos: Any = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if given.truth("add_bos_token", True) and bos in pieces.texts:
        settings["post_processor"] = prepending(bos, pieces.texts.index(bos))
    return {"tokenizer.json": json.dumps(settings).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _proto(data: bytes, source: str) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # it is not there, or protobuf is older than it expects
        raise InputError(
            f"{source}: expected tokenizer.json beside it, or sentencepiece to read it; {extra('sentencepiece')}"
        ) from error
    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise InputError(f"{source}: expected a SentencePiece model, got another file or a damaged one") from error
    if not proto.pieces:
        raise InputError(f"{source}: expected a SentencePiece model, got one without a vocabulary")
    return proto


def _model(pieces: Pieces, ids: Mapping[str, int], unknown: int) -> Any:
    falls_back = sum(kind == BYTE for kind in pieces.kinds) == 256
    if pieces.unigram:
        scored = list(zip(pieces.texts, pieces.scores, strict=True))
        return models.Unigram(scored, unk_id=unknown, byte_fallback=falls_back)
    merges = _merges(pieces, ids)
    return models.BPE(dict(ids), merges, unk_token=pieces.texts[unknown], fuse_unk=True, byte_fallback=falls_back)


def _merges(pieces: Pieces, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The best score first; of a piece's own pairs the one with the shorter first part."""
    found = []
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        if kind not in _NO_MERGES:
            pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
            found += [(-score, ids[text], len(a), a, b) for a, b in pairs if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(found)]


def _normalizer(pieces: Pieces) -> Any:
    rules: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.strips:
        rules += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(rules) if rules else None
