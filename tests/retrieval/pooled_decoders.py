# SPDX-License-Identifier: Apache-2.0
"""Tiny random Qwen3-Embedding and EmbeddingGemma, saved by transformers, in the layout of sentence-transformers."""

import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma3TextConfig, Gemma3TextModel, Qwen3Config, Qwen3Model

Kind = Literal["qwen3", "gemma3"]
KINDS: tuple[Kind, ...] = ("qwen3", "gemma3")
WORDS = ["the", "harbour", "candle", "garden", "boats", "leave", "at", "night", "when", "tide", "bells", "ring", "a"]
PROMPTS = {
    "qwen3": {"query": "Instruct: Given a web search query, retrieve passages\nQuery:", "document": ""},
    "gemma3": {"query": "task: search result | query: ", "document": "title: none | text: "},
}
MOST_TOKENS = {"qwen3": 640, "gemma3": 96}
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "num_hidden_layers": 4, "vocab_size": 400},
}
DENSE = ((32, 80), (80, 24))  # of EmbeddingGemma: wider, then as wide as the vector


@functools.cache
def hf_model(kind: Kind) -> Qwen3Model | Gemma3TextModel:
    """A random model whose every tensor differs from its initial value; EmbeddingGemma's window is 5 on both sides."""
    torch.manual_seed(0)
    if kind == "qwen3":
        config = Qwen3Config(**SIZES, max_position_embeddings=MOST_TOKENS[kind], tie_word_embeddings=True)
        model = Qwen3Model(config)
    else:
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        more = {"sliding_window": 10, "layer_types": kinds, "query_pre_attn_scalar": 12}
        more |= {"use_bidirectional_attention": True, "max_position_embeddings": MOST_TOKENS[kind]}
        model = Gemma3TextModel(Gemma3TextConfig(**SIZES, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def dense_weights() -> tuple[torch.Tensor, ...]:
    """Of EmbeddingGemma's two layers, [out, in]."""
    torch.manual_seed(1)
    return tuple(torch.randn(outputs, inputs) / inputs**0.5 for inputs, outputs in DENSE)


@functools.cache
def tokenizer(kind: Kind) -> Tokenizer:
    """Byte-level with an end token, or, as SentencePiece's, with words that begin by their space, between two."""
    made = Tokenizer(models.BPE())
    corpus = [" ".join(WORDS), *PROMPTS[kind].values()] * 3
    if kind == "qwen3":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special, alphabet = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Replace(" ", "\u2581")
        made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        made.decoder = decoders.Replace("\u2581", " ")
        special, alphabet = ["<bos>", "<eos>"], [*map(chr, range(32, 127)), "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"] - 4, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    ids = [(token, made.token_to_id(token)) for token in special]
    around = "$A <|endoftext|>" if kind == "qwen3" else "<bos> $A <eos>"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return made


def write_json(path: Path, value: object) -> None:
    """With the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save(folder: Path, kind: Kind) -> Path:
    """The model, its tokenizer and the files of sentence-transformers."""
    hf_model(kind).save_pretrained(folder)
    tokenizer(kind).save(str(folder / "tokenizer.json"))
    dense = [f"{at}_Dense" for at in range(2, 4)] if kind == "gemma3" else []
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), *((name, "Dense") for name in dense)]
    parts.append((f"{len(parts)}_Normalize", "Normalize"))
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{name}"}
        for at, (path, name) in enumerate(parts)
    ]
    write_json(folder / "modules.json", modules)
    modes = {"cls_token": False, "mean_tokens": kind == "gemma3", "max_tokens": False, "lasttoken": kind == "qwen3"}
    switches = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32, **switches, "include_prompt": True})
    stated = {"prompts": PROMPTS[kind], "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", stated)
    for name, (inputs, outputs), weight in zip(dense, DENSE, dense_weights(), strict=False):
        sizes = {"in_features": inputs, "out_features": outputs, "bias": False}
        write_json(folder / name / "config.json", sizes | {"activation_function": "torch.nn.modules.linear.Identity"})
        save_file({"linear.weight": weight}, folder / name / "model.safetensors")
    if kind == "gemma3":
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    return folder


def reference_of_ids(kind: Kind, ids: list[int]) -> np.ndarray:
    """The unit vector of one input in torch, without padding."""
    with torch.no_grad():
        hidden_TE = hf_model(kind)(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vector_E = hidden_TE[-1] if kind == "qwen3" else hidden_TE.mean(dim=0)
        for weight in dense_weights() if kind == "gemma3" else ():
            vector_E = weight @ vector_E
    return torch.nn.functional.normalize(vector_E, dim=0).numpy()


def reference(kind: Kind, text: str, prompt: Literal["query", "document"]) -> np.ndarray:
    """The vector of a text that is one input, behind its prompt and without white space around it."""
    return reference_of_ids(kind, tokenizer(kind).encode((PROMPTS[kind][prompt] + text.strip()).strip()).ids)
