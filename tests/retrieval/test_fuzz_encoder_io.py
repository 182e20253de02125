# SPDX-License-Identifier: Apache-2.0
"""An encoder's JSON files with every value replaced: the same encoder, the one transformers reads, or one line."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import transformers

from rapid_jax.retrieval.encoder import EncoderConfig
from rapid_jax.retrieval.encoder_io import load_encoder, read_config
from tests.json_mutations import VALUES, amiss, mutations
from tests.retrieval import pooled_decoders
from tests.retrieval.encoders import save

ADDED = ("position_embedding_type", "is_decoder", "quantization_config", "type_vocab_size", "hidden_act")
# Keys that decide no vector, and of which transformers nevertheless refuses some values.
BESIDE = (
    *("dtype", "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "initializer_range"),
    *("use_cache", "bos_token_id", "eos_token_id", "attention_probs_dropout_prob", "hidden_dropout_prob"),
    *("type_vocab_size", "add_cross_attention", "tie_word_embeddings", "gradient_checkpointing"),
)


def to_transformers(given: dict[str, Any], base: EncoderConfig) -> EncoderConfig | None:
    """The config as transformers reads it, with what it says nothing about from `base`; None where it refuses it."""
    given = {key: value for key, value in given.items() if key not in BESIDE}
    try:
        theirs = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(json.loads(json.dumps(given)))
        offset = 0 if theirs.model_type == "bert" else theirs.pad_token_id + 1
    except Exception:
        return None
    return EncoderConfig(
        vocab_size=theirs.vocab_size,
        embed_dim=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        ffn_dim=theirs.intermediate_size,
        num_positions=theirs.max_position_embeddings,
        position_offset=offset,
        norm_eps=theirs.layer_norm_eps,
        activation=theirs.hidden_act,
        pooling=base.pooling,
        max_tokens=theirs.max_position_embeddings - offset,
        lower_case=base.lower_case,
    )


def check(folder: Path, name: str, given: Any, base: EncoderConfig) -> None:
    """Refused, or what it was; a config.json may also be another, if transformers reads it so and the weights fit."""
    (folder / name).write_text(json.dumps(given))
    config = read_config(folder)
    if name == "config.json" and config != base:
        load_encoder(folder, config, jnp.dtype("float32"))
        assert config == to_transformers(given, base)
    elif name == "sentence_bert_config.json":
        settings = given if isinstance(given, dict) else {}
        assert config.max_tokens == min(settings.get("max_seq_length") or 64, 64)
        assert config.lower_case is (settings.get("do_lower_case") or False)
    else:
        assert config == base


def wrong_of(folder: Path, name: str, more: list[tuple[str, Any]]) -> list[str]:
    """What went wrong, a line each, of the cases made of the file `name`, which is put back as it was."""
    base, given = read_config(folder), json.loads((folder / name).read_text())
    cases = [*mutations(given), *((f"all of it = {value!r}", value) for value in VALUES), *more]
    assert len(cases) > 50
    wrong = [said for what, case in cases if (said := amiss(what, partial(check, folder, name, case, base)))]
    (folder / name).write_text(json.dumps(given))
    return wrong


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_config_with_each_value_replaced(family, tmp_path):
    folder = save(tmp_path, family)
    given = json.loads((folder / "config.json").read_text())
    more = [(f"{key} = {value!r}", given | {key: value}) for key in ADDED if key not in given for value in VALUES]
    wrong = wrong_of(folder, "config.json", more)
    assert not wrong, "\n".join(wrong[:20])


def test_files_of_sentence_transformers_with_each_value_replaced(tmp_path):
    folder = save(tmp_path, "bert", max_seq_length=16, pooling="cls_token")
    settings = {"max_seq_length": 16, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    wrong = [
        line
        for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
        for line in wrong_of(folder, name, [])
    ]
    newer = {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(newer))
    wrong += wrong_of(folder, "1_Pooling/config.json", [])
    assert not wrong, "\n".join(wrong[:20])


def test_files_of_a_decoder_that_pools_with_each_value_replaced(tmp_path):
    """Refused in one line, or read and loaded: prompts and lengths may well be others."""
    folder, wrong = pooled_decoders.save(tmp_path, "gemma3"), []

    def check(file: Path, case: Any) -> None:
        file.write_text(json.dumps(case))
        config = read_config(folder)
        if file.parent != folder:  # of linear layers and the pooling, which the weights must fit
            load_encoder(folder, config, jnp.dtype("float32"))

    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "3_Dense/config.json"):
        file, before = folder / name, (folder / name).read_text()
        cases = [*mutations(json.loads(before)), *((f"all of it = {value!r}", value) for value in VALUES)]
        wrong += [said for what, case in cases if (said := amiss(what, partial(check, file, case)))]
        file.write_text(before)
    assert not wrong, "\n".join(wrong[:20])
