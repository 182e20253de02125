# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models without a tokenizer.json, in folders and in GGUF files: ids against transformers and against
SentencePiece itself.
"""

import io
import json
import random
import sys
from typing import Any

import pytest
import sentencepiece
import transformers

from rapid_jax.model.gguf_tokenizer import tokenizer_files
from rapid_jax.model.pieces import Pieces, tokenizer_json
from rapid_jax.model.tokenizer import Tokenizer, tokenizer_of
from rapid_jax.runtime.errors import InputError

CORPUS = [
    "the cat sat on the mat and the dog ate the bone",
    "Größe naïve 12345 3.14159 it's",
    "def f(x):    return x\n",
    "\u65e5\u672c\u8a9e text  two  spaces",
    "a tab\tand lines\n\nbreak",
] * 20
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
TURNS = ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "\t"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "vocab_size": 360, **PLAIN, "split_digits": True},
    "gemma": {
        **{"model_type": "bpe", "vocab_size": 380, **PLAIN, "add_dummy_prefix": False, "user_defined_symbols": TURNS},
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    },
    "unigram": {"model_type": "unigram", "vocab_size": 54},
    "words": {"model_type": "word", "vocab_size": 20},
}
SPELT = ("<s>the</s> <start_of_turn>user\nhi<end_of_turn>", "<0x0A> <unk>", "the</s> <s><unk>")
TEXTS = (
    "The quick brown fox, it's 12345 and 3.14159!",
    "  two  spaces\n\n\tand a tab \n",
    *(" lead", "trail  ", "", " ", "     ", "a", "\t", "\n\n\n", "the the  the   the    the"),
    "Größe, naïve, \u65e5\u672c\u8a9e, \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji",
    "the cat\u00a0sat\u3000on",
    "\u00e9 e\u0301 \ufb01 \u212b \u2581the \u2581 cat",
    "x\r\ny\x00z\ufeff",
)


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    """The file of each kind."""
    found = {}
    for kind, how in KINDS.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=out,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **how,
        )
        found[kind] = out.getvalue()
    return found


def own(trained: dict[str, bytes], kind: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=trained[kind])  # pyright: ignore[reportCallIssue]


def some_texts() -> list[str]:
    rng = random.Random(0)
    parts = ("the", "cat", " ", "  ", "\n", "\t", "<", ">", "Gr", "\u00f6", "\u8a9e", "\U0001f600", "12", ".", "'s")
    return ["".join(rng.choices(parts, k=rng.randrange(1, 12))) for _ in range(40)]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"tokenizer_class": "LlamaTokenizer"}),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
        ("gemma", {"tokenizer_class": "GemmaTokenizer"}),
    ],
)
def test_ids_and_text_are_those_of_transformers(kind: str, config: dict[str, Any], trained, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained[kind])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | names))
    ours, theirs = tokenizer_of(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == config["tokenizer_class"] and ours.files.keys() == {
        "tokenizer.model",
        "tokenizer_config.json",
    }
    for text in (*TEXTS, *SPELT, *some_texts()):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        if text != SPELT[0]:  # whose bos is not doubled
            assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_words_in_quotes_are_what_sentencepiece_makes_of_them(kind: str, trained):
    """No text is a special token; the library puts no second space before a text that begins with one."""
    ours, theirs = Tokenizer({"tokenizer.model": trained[kind]}), own(trained, kind)
    assert (ours.special_tokens["bos_token"], ours.stop_ids) == ("<s>", (theirs.eos_id(),))
    for text in (*TEXTS, *some_texts()):
        if kind == "unigram" or not text.startswith((" ", "\u2581")):
            assert ours.encode_quoted(text) == theirs.encode(text), text
    if kind == "llama":  # the other has no pieces for brackets
        assert [ours.encode_quoted(text) for text in SPELT] == [theirs.encode(text) for text in SPELT]
    assert ours.encode("the", add_special_tokens=True) == [theirs.bos_id(), *theirs.encode("the")]


def test_turns_that_are_pieces_end_answers_and_are_not_spelt_by_documents(trained):
    config = {"chat_template": "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>\n{% endfor %}"}
    ours = Tokenizer({"tokenizer.model": trained["gemma"], "tokenizer_config.json": json.dumps(config).encode()})
    turns = {ours.id_of("<start_of_turn>"), ours.id_of("<end_of_turn>")}
    assert None not in turns and set(ours.stop_ids) == {1, ours.id_of("<end_of_turn>")}
    assert turns < set(ours.encode(SPELT[0])) and turns.isdisjoint(ours.encode_quoted(SPELT[0]))
    assert ours.decode(ours.encode_quoted(SPELT[0])) == SPELT[0]


def metadata(processor: Any, **changed: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a model."""
    size = processor.get_piece_size()
    kinds = []
    for id in range(size):
        piece = processor.id_to_piece(id)
        kind = 4 if processor.pad_id() == 0 and piece in TURNS else 1
        tests = (processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6)
        kinds.append(next((number for test, number in tests if test(id)), kind))
    found = {
        "model": "llama",
        "pre": "default",
        "tokens": [processor.id_to_piece(id) for id in range(size)],
        "scores": [processor.get_score(id) for id in range(size)],
        "token_type": kinds,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in (found | changed).items()}
    return keys | {"general.architecture": "llama", "llama.context_length": 512}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_gguf_file_s_ids_are_the_folder_s(kind: str, trained):
    folder = Tokenizer({"tokenizer.model": trained[kind]})
    changed = {"add_space_prefix": False} if kind == "gemma" else {}
    files = tokenizer_files(metadata(own(trained, kind), **changed))
    ours = Tokenizer(files)
    assert ours.stop_ids == folder.stop_ids
    for text in (*TEXTS, *SPELT, *some_texts()):
        assert ours.encode(text, add_special_tokens=True) == folder.encode(text, add_special_tokens=True), text
        assert ours.encode_quoted(text) == folder.encode_quoted(text), text


def test_what_fills_a_gguf_vocabulary_up_is_no_token(trained):
    """A piece that the checkpoint itself leaves unused is one, and so is a filler that is the padding's."""
    plain = metadata(own(trained, "llama"))
    tokens, scores, kinds = (plain[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    size = len(tokens)
    more = {"scores": [*scores, *[-1e4] * 3], "token_type": [*kinds, 5, 5, 5]}
    more["tokens"] = [*tokens, "<unused>", f"[PAD{size + 1}]", f"[PAD{size + 2}]"]
    for named, end in ({}, size + 1), ({"padding_token_id": size + 1}, size + 2):
        found = Tokenizer(tokenizer_files(plain | {f"tokenizer.ggml.{k}": v for k, v in (more | named).items()}))
        assert found.ids == set(range(end))
        assert found.encode(" ".join(TEXTS)) == Tokenizer(tokenizer_files(plain)).encode(" ".join(TEXTS))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe' is not supported; supported: default"),
        ({"scores": [0.0]}, "expected a score and a kind of each of 360 pieces, got 1 and 360"),
        ({"scores": ["a"]}, "tokenizer.ggml.scores must be a list of numbers"),
        ({"precompiled_charsmap": [1]}, "tokenizer.ggml.precompiled_charsmap must be false or empty"),
        ({"token_type": [1] * 360}, "has no piece for what is unknown"),
    ],
)
def test_a_gguf_vocabulary_that_cannot_be_is_refused(changed: dict[str, Any], words: str, trained):
    with pytest.raises(InputError, match=words):
        tokenizer_files(metadata(own(trained, "llama"), **changed))


def test_what_is_no_such_model_is_refused_in_one_line(trained, monkeypatch):
    for data in (b"", b"IQ== 0\nIg== 1\n", trained["llama"][:-3]):
        with pytest.raises(InputError, match=r"^tokenizer\.model: expected a SentencePiece model, got"):
            Tokenizer({"tokenizer.model": data})
    with pytest.raises(InputError, match="expected a BPE or a unigram model"):
        Tokenizer({"tokenizer.model": trained["words"]})
    with pytest.raises(InputError, match=r"a: its vocabulary has 'x' twice"):
        tokenizer_json(Pieces(["<unk>", "x", "x"], [0.0] * 3, [2, 1, 1]), "a")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"expected tokenizer\.json beside it, .*pip install '\.\[sentencepiece\]'"):
        Tokenizer({"tokenizer.model": trained["llama"]})
