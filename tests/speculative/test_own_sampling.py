# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's own sampling: what transformers' generate does with the same generation_config.json."""

import json

import pytest
from transformers import GenerationConfig

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, parse_object
from rapid_jax.speculative.config import SamplingConfig, SamplingSettings
from rapid_jax.speculative.own_sampling import resolve

FILES = {
    "Llama 3.1": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]},
    "Qwen 2.5": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    "samples and says no more": {"do_sample": True},
    "samples from everything": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "does not say that it samples": {"temperature": 0.6, "top_p": 0.9, "top_k": None},
    "does not sample": {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2},
    "empty": {},
}


def own(**file) -> Fields:
    return parse_object(json.dumps(file), "model/generation_config.json")


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_the_files_rules_are_those_of_transformers(file):
    theirs = GenerationConfig(**GenerationConfig._get_default_generation_params())
    theirs.update(**{name: value for name, value in file.items() if value is not None})
    got = resolve(SamplingSettings(), own(**file)).config
    assert got.repetition_penalty == theirs.repetition_penalty
    assert (got.temperature > 0) == theirs.do_sample
    if theirs.do_sample:
        wanted = theirs.temperature, theirs.top_k, theirs.top_p, theirs.min_p or 0.0
        assert (got.temperature, got.top_k, got.top_p, got.min_p) == wanted
    assert got.penalize == ("all" if theirs.repetition_penalty != 1 else "generated")


def test_settings_go_before_the_file_one_by_one():
    file = own(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    found = resolve(SamplingSettings(temperature=0.3, top_k=7, max_new_tokens=5, seed=3), file)
    assert found.config == SamplingConfig(0.3, 7, 0.9, 0.0, 1.1, "all", max_new_tokens=5, seed=3)
    assert {found.origins[name] for name in ("temperature", "top_k")} == {"settings"}
    assert found.origins["top_p"] == "generation_config.json"
    assert str(found) == (
        "temperature 0.3 (settings), top_k 7 (settings), top_p 0.9 (generation_config.json), "
        "repetition_penalty 1.1 (generation_config.json)"
    )
    greedy = resolve(SamplingSettings(temperature=0.0), file).config
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.repetition_penalty) == (0, 0, 1, 1.1)
    assert resolve(SamplingSettings(), own(do_sample=True, top_p=0)).config.top_p == 1e-9
    whole = SamplingConfig(temperature=0.8, top_k=3)
    assert resolve(whole, file).config == whole


def test_without_a_file_answers_are_greedy_and_a_temperature_samples_from_everything():
    assert resolve(SamplingSettings(), None).config == SamplingConfig(temperature=0.0)
    assert resolve(SamplingSettings(temperature=1.0), None).config == SamplingConfig()
    assert str(resolve(SamplingSettings(), None)) == "temperature 0 (no generation_config.json: do_sample is not true)"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
        ({"do_sample": True, "temperature": "0.6"}, "temperature must be a number, got '0.6'"),
        ({"do_sample": True, "temperature": [0.6]}, "temperature must be a number, got"),
        ({"do_sample": True, "temperature": -1}, "temperature must be a number >= 0, 0 or 1e-4 to 1e4, got -1"),
        ({"do_sample": True, "top_k": 2.5}, "top_k must be a whole number of at least 0, got 2.5"),
        ({"do_sample": True, "top_k": -5}, "top_k must be a whole number"),
        ({"do_sample": True, "top_k": True}, "top_k must be a whole number"),
        ({"do_sample": True, "top_p": 7}, r"top_p must be in \(0, 1\], got 7"),
        ({"do_sample": True, "min_p": {}}, "min_p must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number > 0, 1e-3 to 1e3, got 0"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be a number"),
    ],
)
def test_a_value_that_is_none_is_refused_with_file_and_key(file, message):
    with pytest.raises(InputError, match=f"^model/generation_config.json: {message}"):
        resolve(SamplingSettings(), own(**file))


def test_what_is_not_implemented_is_named():
    file = own(
        do_sample=True, num_beams=4, typical_p=0.9, no_repeat_ngram_size=0, suppress_tokens=[3], bad_words_ids=None
    )
    assert set(resolve(SamplingSettings(), file).ignored) == {"num_beams 4", "typical_p 0.9", "suppress_tokens [3]"}
    assert resolve(SamplingSettings(temperature=0.0), file).ignored == ("num_beams 4", "suppress_tokens [3]")
    assert resolve(SamplingSettings(), own(**FILES["Qwen 2.5"], num_beams=1, guidance_scale=1.0)).ignored == ()


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 1e-30}, {"temperature": 1e39}, {"repetition_penalty": 1e-40}, {"repetition_penalty": 1e39}],
)
def test_what_float32_has_no_room_for_is_refused(setting):
    with pytest.raises(InputError, match=f"^{next(iter(setting))} must be a number"):
        SamplingSettings(**setting)
