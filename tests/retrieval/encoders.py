# SPDX-License-Identifier: Apache-2.0
"""Tiny random encoders of both families, saved by transformers as users' folders are."""

import functools
import json
from pathlib import Path

import jax
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

# The forward pass as it is run: compiled.
hidden_of = jax.jit(lambda encoder, ids_BT, mask_BT: encoder.hidden(ids_BT, mask_BT))
vectors_of = jax.jit(lambda encoder, ids_BT, mask_BT: encoder(ids_BT, mask_BT))

WORDS = [f"w{i}" for i in range(90)]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@functools.cache
def hf_model(family: str) -> BertModel | XLMRobertaModel:
    """A random model whose every tensor, biases and norms included, differs from its initial value."""
    torch.manual_seed(0)
    if family == "bert":
        model = BertModel(BertConfig(**SIZES, max_position_embeddings=64, type_vocab_size=2))
    else:
        model = XLMRobertaModel(
            XLMRobertaConfig(**SIZES, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tokenizer(family: str) -> Tokenizer:
    """Whole words w0 .. w89, the family's special tokens around a text, and a truncation that must not be used."""
    first, last, pad = ("[CLS]", "[SEP]", "[PAD]") if family == "bert" else ("<s>", "</s>", "<pad>")
    order = [pad, "[UNK]", first, last] if family == "bert" else [first, pad, last, "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*order, *WORDS, "a"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    made.add_special_tokens([first, last, pad])
    made.enable_truncation(5)
    made.enable_padding(length=5)
    return made


def save(
    folder: Path, family: str, *, max_seq_length: int | None = None, pooling: str | None = None, **options
) -> Path:
    """The family's model and tokenizer in a folder; with `pooling` also the files of sentence-transformers."""
    hf_model(family).save_pretrained(folder, **options)
    tokenizer(family).save(str(folder / "tokenizer.json"))
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    if pooling is not None:
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        stated = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **stated}))
    return folder
