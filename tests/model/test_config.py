# SPDX-License-Identifier: Apache-2.0
"""config.json read and written: both generations' spellings, and what is refused."""

import dataclasses
import json

import pytest
import transformers

from rapid_jax.model.config import LayerKind, ModelConfig, from_hf, to_hf
from rapid_jax.model.rope_config import Rope
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from tests.model.conftest import FAMILIES, LLAMA3, SIZES, YARN

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2}
SMOLLM3 = QWEN3 | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_hidden_layers": 6}
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_key_value_heads": 2}
# As gemma-3-4b-it's: what is as in transformers' own 4B is left out.
WITH_IMAGES = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_transformers_writes_and_transformers_reads_what_is_written(name, tmp_path):
    kind, special = FAMILIES[name]
    theirs = getattr(transformers, kind)(**SIZES | special, eos_token_id=[7, 9])
    theirs.architectures = [kind.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    ours = from_hf(json.loads((tmp_path / "config.json").read_text()))
    written = to_hf(ours)
    assert from_hf(written) == ours
    assert json.loads(json.dumps(written)) == written

    (tmp_path / "config.json").write_text(json.dumps(written))
    back = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(back) is type(theirs)
    # What transformers leaves to its defaults is written out, so nothing depends on them.
    assert back.rope_parameters.items() >= theirs.rope_parameters.items()
    ignored = {"transformers_version", "_name_or_path", "dtype", "rope_parameters", "layer_types", "max_window_layers"}
    kept = {key: value for key, value in theirs.to_dict().items() if key not in ignored}
    assert {key: back.to_dict()[key] for key in kept} == kept


def test_older_spelling_of_rope_equals_the_newer():
    older = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    newer = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    assert from_hf(older) == from_hf(newer)
    assert from_hf(older).rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


def test_defaults_are_those_of_the_first_llama_checkpoints():
    config = from_hf(LLAMA | {"head_dim": None})
    assert (config.rope, config.num_kv_heads, config.head_dim) == (Rope(10000.0), 4, 8)
    assert not config.tie_embeddings and not config.qkv_bias
    assert from_hf(QWEN2).qkv_bias
    assert (from_hf(QWEN3).head_dim, from_hf(QWEN3).qk_norm, from_hf(QWEN3).qkv_bias) == (128, True, False)
    assert from_hf(MISTRAL | {"sliding_window": None, "head_dim": 16}).head_dim == 16


def test_layers_without_rope_are_a_pattern_that_repeats():
    with_rope, without = LayerKind(), LayerKind(rotated=False)
    config = from_hf(SMOLLM3)
    assert config.pattern == (with_rope, with_rope, with_rope, without) and config.tie_embeddings
    assert (config.kinds, config.kind_of) == ((with_rope, without), (0, 0, 0, 1, 0, 0)) and config.rope.theta == 2e6
    assert to_hf(config)["no_rope_layers"] == [1, 1, 1, 0, 1, 1]
    assert from_hf(SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0, 1, 1, 0]}).pattern == config.pattern
    assert dataclasses.replace(config, num_layers=3).kinds == (with_rope,)
    assert from_hf(SMOLLM3 | {"no_rope_layers": [0] * 6}).pattern == (without,)
    assert from_hf(SMOLLM3 | {"use_sliding_window": True, "sliding_window": 512, "no_rope_layers": [1] * 6})


def test_the_text_part_of_a_model_of_text_and_images():
    config = from_hf(WITH_IMAGES)
    sizes = (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim, config.max_positions)
    assert sizes == (262208, 8, 4, 256, 131072)
    local, whole = LayerKind(window=1024, rope=Rope(1e4)), LayerKind()
    assert config.pattern == (*[local] * 5, whole) and config.kind_of[:7] == (0, 0, 0, 0, 0, 1, 0)
    assert config.rope == Rope(1e6, "linear", 8.0) and config.tie_embeddings
    assert config.query_scale == 1 and config.embedding_scale == 2560**0.5
    assert config.carried_keys() == {"eos_token_id": [1, 106]}
    assert from_hf(to_hf(config)) == config
    theirs = transformers.Gemma3Config(**WITH_IMAGES)
    assert theirs.text_config.layer_types == to_hf(config)["layer_types"]
    newer = to_hf(config) | {"rope_theta": 3.0, "rope_scaling": None, "rope_local_base_freq": 3.0}
    assert from_hf(newer | {"rope_parameters": theirs.text_config.rope_parameters}) == config


def test_scores_that_are_not_divided_by_the_root_of_a_head():
    config = from_hf(GEMMA3 | {"head_dim": 128, "query_pre_attn_scalar": 168})
    assert config.query_scale == (128 / 168) ** 0.5 and to_hf(config)["query_pre_attn_scalar"] == 168


LONGROPE = {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0]}


def test_longrope_is_of_a_part_of_the_head_and_its_older_name_is_known():
    given = PHI3 | {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 1024}
    config = from_hf(given)
    rope = config.rope
    assert (rope.scaling, rope.short_factor, rope.long_factor) == ("longrope", (1.0, 1.5), (2.0, 8.0))
    assert (rope.factor, rope.original_max_positions, config.rotary_dim) == (4.0, 1024, 4)
    assert config.num_kv_heads == 4 and config.joined
    written = to_hf(config)
    assert written["rope_scaling"]["rope_type"] == "longrope" and from_hf(written) == config
    assert written["original_max_position_embeddings"] == 1024 and written["partial_rotary_factor"] == 0.5
    longer = to_hf(dataclasses.replace(config, max_positions=8192))  # as LongPO exports it: cos and sin as trained
    assert from_hf(longer).rope == rope


def test_unknown_keys_are_carried_through_and_the_config_stays_hashable():
    given = LLAMA | {"initializer_range": 0.02, "eos_token_id": [1, 2], "my_own_key": {"b": 1, "a": None}}
    config = from_hf(given)
    assert config.carried_keys() == {
        "initializer_range": 0.02,
        "eos_token_id": [1, 2],
        "my_own_key": {"b": 1, "a": None},
    }
    assert to_hf(config)["my_own_key"] == {"b": 1, "a": None}
    assert hash(config) == hash(from_hf(dict(reversed(given.items()))))


def test_an_override_of_the_rope_base_is_exported():
    config = from_hf(LLAMA)
    config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=2.5e7))
    assert to_hf(config)["rope_theta"] == 2.5e7


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (LLAMA | {"model_type": "gemma2"}, "soft caps of scores and logits is not supported, got 'gemma2'"),
        (LLAMA | {"model_type": "gemma3n_text"}, "keys that layers share is not supported, got 'gemma3n_text'"),
        (LLAMA | {"model_type": "kimi_linear"}, "linear attention is not supported, got 'kimi_linear'"),
        (LLAMA | {"model_type": "lfm2"}, "a convolution in the place of attention is not supported, got 'lfm2'"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be null or false"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention must be null or false"),
        (GEMMA3 | {"hidden_activation": "silu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        (
            GEMMA3 | {"layer_types": ["chunked_attention"] * 2},
            "layer_types must be a list of full_attention and sliding",
        ),
        (
            GEMMA3 | {"rope_parameters": {"rope_theta": 1e6}},
            "rope_parameters.rope_theta must be part of full_attention",
        ),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention.rope_type must be default",
        ),
        (WITH_IMAGES | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (WITH_IMAGES | {"text_config": {"num_hidden_layers": "4"}}, "text_config.num_hidden_layers"),
        (LLAMA | {"model_type": "qwen2_moe"}, "a mixture of experts is not supported, got 'qwen2_moe'"),
        (QWEN3 | {"model_type": "qwen3_moe", "architectures": []}, "num_experts must be"),
        (MIXTRAL | {"num_experts_per_tok": 5}, "num_experts_per_tok must be"),
        (LLAMA | {"model_type": "gpt_oss"}, "attention sinks and a mixture of experts is not .*'gpt_oss'"),
        (LLAMA | {"model_type": "llama4_text"}, "attention in chunks .*'llama4_text'"),
        (LLAMA | {"model_type": "qwen3_next"}, "linear attention is not supported, got 'qwen3_next'"),
        (QWEN3 | {"attention_bias": True}, "attention_bias"),
        (SMOLLM3 | {"mlp_bias": True}, "mlp_bias"),
        (LLAMA | {"architectures": ["LlavaForConditionalGeneration"]}, "LlavaForConditionalGeneration"),
        (LLAMA | {"hidden_act": "gelu"}, "gelu"),
        (LLAMA | {"attention_bias": True}, "attention_bias"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor must be a list of numbers"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"hidden_size": 30}, "hidden_size must be a multiple .*got 30"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads must be a divisor .*got 3"),
        (LLAMA | {"vocab_size": "100"}, "vocab_size"),
        ({key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}, "rms_norm_eps"),
        ({key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"}, "num_key_value_heads"),
    ],
)
def test_what_would_change_a_number_is_refused_by_name(given, word):
    with pytest.raises(InputError, match=word) as caught:
        from_hf(given)
    assert "\n" not in str(caught.value)


YARN_TO_16384 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SLIDING = {"use_sliding_window": True, "sliding_window": 512}


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        (MISTRAL | {"max_position_embeddings": 8192}, (4096, 4096)),  # transformers' value where the key is absent
        (MISTRAL | {"sliding_window": 1024}, (1024, 1024)),
        # as long as the context before yarn stretches it
        (MISTRAL | {"sliding_window": 4096, "rope_scaling": YARN_TO_16384}, (4096, 4096)),
        (PHI3 | {"sliding_window": 2047}, (2047, 2047)),
        (QWEN2 | SLIDING | {"max_window_layers": 1}, (None, 512)),
        (QWEN3 | SLIDING | {"max_window_layers": 0}, (512, 512)),
        (QWEN3 | SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}, (512, None)),
        (SMOLLM3 | SLIDING, (None, None, None, 512, None, None)),
        (SMOLLM3 | SLIDING | {"layer_types": ["sliding_attention"] + ["full_attention"] * 5}, (512, *[None] * 5)),
    ],
)
def test_windows_are_a_layer_s_kind_and_exported(given, windows):
    config = from_hf(given)
    assert config.window_of == windows
    assert from_hf(to_hf(config)) == config


def test_a_window_that_never_closes_is_accepted_and_exported_as_none():
    assert to_hf(from_hf(MISTRAL | {"sliding_window": 4096}))["sliding_window"] is None
    inactive = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2}
    assert to_hf(from_hf(QWEN2 | inactive))["use_sliding_window"] is False
    assert from_hf(QWEN2 | {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 0})


def test_yarn_defaults_are_transformers_own():
    rope = from_hf(LLAMA | {"rope_scaling": YARN}).rope
    assert (rope.beta_fast, rope.beta_slow, rope.truncate, rope.attention_factor) == (32.0, 1.0, True, None)
    assert isinstance(from_hf(LLAMA), ModelConfig)


def rope(**values) -> dict:
    return LLAMA | {"rope_scaling": values}


ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        # another type than a model's number has
        (LLAMA | {"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        (LLAMA | {"rope_scaling": ["yarn"]}, "rope_scaling must be an object"),
        (LLAMA | {"rope_parameters": 3}, "rope_parameters must be an object"),
        (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures must be a list of strings"),
        (LLAMA | {"model_type": ["llama"]}, "model_type must be a string"),
        (LLAMA | {"hidden_act": {}}, "hidden_act must be a string"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        (LLAMA | {"attention_bias": "false"}, "attention_bias must be true or false"),
        (LLAMA | {"quantization_config": {}}, "quantization_config must be null"),
        (LLAMA | {"per_layer_config": {"0": {}}}, "per_layer_config must be null"),
        (MISTRAL | {"sliding_window": "4096"}, "sliding_window must be a whole number"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window must be a whole number of at least 1, got 0"),
        (QWEN2 | {"use_sliding_window": "false"}, "use_sliding_window must be true or false"),
        (QWEN2 | {"max_window_layers": "2"}, "max_window_layers must be a whole number"),
        (QWEN2 | {"layer_types": "full_attention"}, "layer_types must be a list of strings"),
        (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types must be a list of as many"),
        (QWEN2 | {"layer_types": ["linear_attention"] * 2}, "layer_types must be a list of full_attention"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of as many as num_hidden_layers, 6"),
        (SMOLLM3 | {"no_rope_layers": [1, 0, 1, 0, 1, 2]}, "no_rope_layers must be a list of whole numbers"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be a whole number"),
        (PHI3 | {"rope_scaling": LONGROPE}, "short_factor must be 4 numbers of at least 1e-06"),
        (PHI3 | {"rope_scaling": LONGROPE | {"long_factor": [0.0, 1.0]}, "partial_rotary_factor": 0.5}, "long_factor"),
        (PHI3 | {"partial_rotary_factor": 0.4}, "partial_rotary_factor must be such that an even part of a head of 8"),
        *((LLAMA | {"eos_token_id": value}, "eos_token_id must be") for value in ("</s>", [2, None], 2.0, -1, [2**31])),
        *((LLAMA | {key: "x"}, f"{key} must be") for key in ("bos_token_id", "pad_token_id")),
        # sizes that no model has
        *(
            (LLAMA | {key: 4_000_000_000}, f"{key} must be a whole number from 1 to")
            for key in (
                "num_hidden_layers",
                "hidden_size",
                "vocab_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
        ),
        *(
            (LLAMA | {"rms_norm_eps": value}, "rms_norm_eps must be a number")
            for value in (float("nan"), float("inf"), 0, -1e-5, 1e300, "1e-5", True)
        ),
        # angles that are none
        *(
            (LLAMA | {"rope_theta": value}, "rope_theta must be a number")
            for value in (0, 0.0, -1e4, 1.0, float("nan"), float("inf"), 1e300, "1e6", None, True)
        ),
        (rope(rope_type="linear", factor=2.0, rope_theta=None), "rope_scaling.rope_theta must be a number"),
        *(
            (rope(rope_type="linear", factor=value), "rope_scaling.factor must be a number")
            for value in (0.0, -4.0, float("nan"), 1e-300, 1e300, None)
        ),
        (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 0.0}}, "low_freq_factor must be a number"),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor must be above",
        ),
        (LLAMA | {"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast must be a number"),
        (LLAMA | {"rope_scaling": YARN | {"beta_slow": 1e-320}}, "beta_slow must be a number"),
        (LLAMA | {"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor must be a number"),
        (LLAMA | {"rope_scaling": YARN | {"mscale": -1.0}}, "mscale must be a number"),
        (LLAMA | {"rope_scaling": YARN | {"truncate": None}}, "truncate must be true or false, got null"),
        (
            LLAMA | {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings must",
        ),
        (
            LLAMA | {"rope_scaling": YARN, "original_max_position_embeddings": None},
            "original_max_position_embeddings must",
        ),
        (LLAMA | {"rope_scaling": YARN | {"factor": 1e6}}, "factor must be such that the context has at most"),
        (rope(rope_type="yarn", original_max_position_embeddings=4096), "factor must be"),
        # a rule without its name, or with another for each kind of layer
        (rope(factor=4.0), "rope_scaling.rope_type must be there beside 'factor', got no such key"),
        (
            LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention",
        ),
        (rope(rope_type=None, factor=4.0), "rope_scaling.rope_type must be a string, got null"),
    ],
)
def test_a_value_that_no_model_can_have_names_file_and_key(given, line):
    with pytest.raises(InputError, match=r"^models/a/config\.json: ") as caught:
        from_hf(Fields(given, "models/a/config.json"))
    assert line in str(caught.value)
    assert str(caught.value).isprintable()


def test_null_is_no_such_key_where_transformers_has_a_default():
    nulls = ("head_dim", "num_key_value_heads", "rope_scaling", "quantization_config", "architectures", "eos_token_id")
    changed = dataclasses.replace(from_hf(LLAMA | dict.fromkeys(nulls)), carried="{}")
    assert changed == dataclasses.replace(from_hf(LLAMA), carried="{}")
    assert from_hf(LLAMA | {"rope_scaling": YARN | {"beta_fast": None, "mscale": None}}).rope.beta_fast == 32
    assert (
        from_hf(LLAMA | {"max_position_embeddings": 131072, "rope_scaling": YARN | {"factor": None}}).rope.factor == 4
    )
