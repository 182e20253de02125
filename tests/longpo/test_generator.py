# SPDX-License-Identifier: Apache-2.0
"""Answers do not depend on what they are computed beside, and drafting changes no greedy one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_jax.config import GenerationConfig, LongPOConfig, PairsConfig, PolicyConfig
from longpo_jax.dialogue import Dialogue
from longpo_jax.generator import Generator
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig
from tests.tiny_models import save_decoder, words

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.2, max_new_tokens=12)
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("tiny"))


def config_for(folder: Path, **changes) -> LongPOConfig:
    config = LongPOConfig(
        model=PolicyConfig(source=str(folder), dtype="float32"),
        pairs=PairsConfig(batch=3, gamma=3),
        generation=GenerationConfig(prefill_chunk=64, attention_block=128),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def generator(folder) -> Generator:
    return Generator(config_for(folder), quiet=True)


@pytest.fixture(scope="module")
def prompts(generator) -> list[list[int]]:
    """Three short prompts, of which the longest comes first."""
    return [prompt(generator, words(count, seed=count), "w1?") for count in (60, 20, 40)]


def prompt(generator: Generator, context: str, question: str) -> list[int]:
    return Dialogue(generator.tokenizer, [question]).shared(context)


def plain_greedy(folder: Path, generator: Generator, prompt: list[int], theta: float | None = None) -> str:
    config = LlamaConfig.from_pretrained(folder)
    if theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    model = LlamaForCausalLM.from_pretrained(folder, config=config)
    new = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=[2])[
        0, len(prompt) :
    ]
    return generator.tokenizer.decode([token for token in new.tolist() if token != 2])


def alone(generator: Generator, prompts, sampling) -> list:
    return [generator.answers([one], sampling, [seed])[0] for one, seed in zip(prompts, SEEDS, strict=True)]


def test_a_batch_answers_as_each_prompt_alone(generator, prompts):
    for sampling in (GREEDY, SAMPLED):
        together = generator.answers(prompts, sampling, SEEDS)
        assert together == alone(generator, prompts, sampling)
        assert len({answer.text for answer in together}) == 3
        turned = generator.answers(prompts[::-1], sampling, SEEDS[::-1])
        assert turned == together[::-1]
    assert generator.answers([], GREEDY, []) == []


def test_a_greedy_answer_is_that_of_transformers(folder, generator, prompts):
    answers = generator.answers(prompts, GREEDY, SEEDS)
    assert [answer.text for answer in answers] == [plain_greedy(folder, generator, one) for one in prompts]


def test_the_seed_and_the_sampling_decide_a_drawn_answer(generator, prompts):
    first = generator.answers(prompts, SAMPLED, SEEDS)
    assert first == generator.answers(prompts, SAMPLED, SEEDS)
    other = generator.answers(prompts, SAMPLED, [seed + 1 for seed in SEEDS])
    assert all(one != two for one, two in zip(first, other, strict=True))
    penalized = generator.answers(prompts, replace(GREEDY, repetition_penalty=50.0), SEEDS)
    assert penalized != generator.answers(prompts, GREEDY, SEEDS)


def test_questions_about_one_document_share_its_one_copy(generator, monkeypatch):
    """As each whole prompt alone; the document is read once, in one row."""
    dialogues = [Dialogue(generator.tokenizer, [f"w{index} w2?"]) for index in range(3)]
    document = words(150, seed=9)
    head = dialogues[0].before + generator.tokenizer.encode_quoted(document)
    tails = [dialogue.first for dialogue in dialogues]
    whole = [dialogue.shared(document) for dialogue in dialogues]
    assert [head + tail for tail in tails] == whole
    read = []
    prefilled = generator._prefilled
    monkeypatch.setattr(generator, "_prefilled", lambda given: read.append(given) or prefilled(given))
    for sampling in (GREEDY, SAMPLED):
        read.clear()
        answers = generator.answers_about(head, tails, sampling, SEEDS)
        assert read == [[head]]
        assert answers == alone(generator, whole, sampling)
        assert len({answer.text for answer in answers}) > 1
    assert generator.answers_about(head, [], GREEDY, []) == []


def test_drafts_from_the_excerpt_change_no_greedy_answer(folder, generator):
    document = words(150, seed=9)
    dialogues = [Dialogue(generator.tokenizer, [f"w{index} w2?"]) for index in range(2)]
    head = dialogues[0].before + generator.tokenizer.encode_quoted(document)
    tails = [dialogue.first for dialogue in dialogues]
    drafts = [dialogue.shared(document[:200]) for dialogue in dialogues]
    for sampling in (GREEDY, replace(GREEDY, repetition_penalty=1.3)):
        plain = generator.answers_about(head, tails, sampling, SEEDS[:2])
        assert generator.answers_about(head, tails, sampling, SEEDS[:2], drafts=drafts) == plain
    drawn = generator.answers_about(head, tails, SAMPLED, SEEDS[:2], drafts=drafts)
    each = [
        generator.answers_about(head, [tail], SAMPLED, [seed], drafts=[draft])[0]
        for tail, seed, draft in zip(tails, SEEDS, drafts, strict=False)
    ]
    assert drawn == each


def test_an_answer_says_whether_it_ended_by_itself(generator, prompts):
    limit = replace(SAMPLED, temperature=3.0, top_p=1.0, max_new_tokens=120)
    answers = generator.answers(prompts * 3, limit, range(9))
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert answer.tokens < 120 if answer.finished else answer.tokens == 120
        assert "<|im_end|>" not in answer.text


def test_the_theta_of_generation_comes_first(folder, generator, prompts):
    model = PolicyConfig(source=str(folder), dtype="float32", rope_theta=500.0)
    policy = Generator(config_for(folder, model=model), quiet=True)
    both = Generator(config_for(folder, model=replace(model, generation_rope_theta=2000.0)), quiet=True)
    hashes = [one.weights_hash for one in (generator, policy, both)]
    assert len(set(hashes)) == 3
    assert hashes == [one.model.weights_hash for one in (generator, policy, both)]
    assert [one.model.config.rope.theta for one in (generator, policy, both)] == [10000.0, 500.0, 2000.0]
    said = policy.answers(prompts[:1], GREEDY, SEEDS[:1])[0]
    assert said.text == plain_greedy(folder, generator, prompts[0], theta=500.0)


def test_other_tokenizer_files_are_another_identity(folder, generator, tmp_path):
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "tokenizer_config.json":
            content = content.replace(b"<|im_end|>\\n", b"<|im_end|>")
            assert content != path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    changed = Generator(config_for(folder), str(tmp_path), quiet=True).identity
    ours = generator.identity
    assert {key for key in ours if ours[key] != changed[key]} == {"model.template"}


def test_a_mesh_answers_as_one_device(folder, generator, prompts):
    mesh = GenerationConfig(mesh=MeshConfig(data=2, context=2), prefill_chunk=64, attention_block=128, layout="stacked")
    spread = Generator(config_for(folder, generation=mesh), quiet=True)
    assert spread.answers(prompts, GREEDY, SEEDS) == generator.answers(prompts, GREEDY, SEEDS)
    head, tails = prompts[0][:-8], [prompts[0][-8:], prompts[1][-9:], prompts[2][-10:]]
    drafts = [one[-30:] for one in prompts]
    expected = generator.answers_about(head, tails, GREEDY, SEEDS)
    assert spread.answers_about(head, tails, GREEDY, SEEDS) == expected
    assert spread.answers_about(head, tails, GREEDY, SEEDS, drafts=drafts) == expected
