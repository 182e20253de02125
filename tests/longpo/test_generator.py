# SPDX-License-Identifier: Apache-2.0
"""Answers do not depend on what they are computed beside, and drafting changes no greedy one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_jax.config import ExcerptsConfig, GenerationConfig, LongPOConfig, PairsConfig, PolicyConfig
from longpo_jax.dialogue import Dialogue
from longpo_jax.generator import About, Generator
from longpo_jax.records import Answer
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig
from tests.compiled import compiled
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
        excerpts=ExcerptsConfig(min_tokens=32, max_tokens=64),
        pairs=PairsConfig(batch=3, gamma=3),
        generation=GenerationConfig(prefill_chunk=64, attention_block=128),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def generator(folder) -> Generator:
    return Generator(config_for(folder), quiet=True)


@pytest.fixture(scope="module")
def prompts(generator) -> list[list[int]]:
    """Three short prompts, the longest first; alone or together they take the same programs but for their rows."""
    found = [prompt(generator, words(40, seed=count)[:count], "w1?") for count in (90, 80, 88)]
    assert len(found[0]) > len(found[2]) > len(found[1])
    return found


@pytest.fixture(scope="module")
def questions(generator) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """A document's head, three tails, and a shorter prompt for each."""
    dialogues = [Dialogue(generator.tokenizer, [f"{words(4, seed=index)}?"]) for index in range(3)]
    document = words(100, seed=9)
    head = dialogues[0].before + generator.tokenizer.encode_quoted(document)
    tails = [dialogue.first for dialogue in dialogues]
    assert [head + tail for tail in tails] == [dialogue.shared(document) for dialogue in dialogues]
    return head, tails, [dialogue.shared(document[:100]) for dialogue in dialogues]


def prompt(generator: Generator, context: str, question: str) -> list[int]:
    return Dialogue(generator.tokenizer, [question]).shared(context)


def about(
    generator: Generator, head: list[int], tails: Any, sampling: SamplingConfig, seeds: Any, drafts: Any = None
) -> list[Answer]:
    """The answers about one document."""
    (found,) = generator.answers_about([About(head, tails, drafts)], sampling, [list(seeds)])
    return found


def plain_greedy(folder: Path, generator: Generator, prompt: list[int], theta: float = 10000.0) -> str:
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    model: Any = LlamaForCausalLM.from_pretrained(folder, config=config)
    stops = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": [2]}
    new = model.generate(torch.tensor([prompt]), **stops)[0, len(prompt) :]
    text = generator.tokenizer.decode([token for token in new.tolist() if token != 2])
    return text if 2 in new else text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that was cut


def test_a_batch_answers_as_each_prompt_alone(generator, prompts):
    together = generator.answers(prompts, SAMPLED, SEEDS)
    each = [generator.answers([one], SAMPLED, [seed])[0] for one, seed in zip(prompts, SEEDS, strict=True)]
    assert together == each and len({answer.text for answer in together}) == 3
    assert generator.answers(prompts[::-1], SAMPLED, SEEDS[::-1]) == together[::-1]
    assert generator.answers([], SAMPLED, []) == []


def test_a_greedy_answer_is_that_of_transformers(folder, generator, prompts):
    answers = generator.answers(prompts, GREEDY, SEEDS)
    expected = [plain_greedy(folder, generator, one) for one in prompts]
    assert [answer.text for answer in answers] == expected and len(set(expected)) == 3


def test_the_seed_and_the_sampling_decide_a_drawn_answer(generator, prompts):
    first = generator.answers(prompts, SAMPLED, SEEDS)
    others = [
        generator.answers(prompts, SAMPLED, [seed + 1 for seed in SEEDS]),
        generator.answers(prompts, replace(SAMPLED, repetition_penalty=50.0), SEEDS),
        generator.answers(prompts, replace(SAMPLED, temperature=0.1), SEEDS),
        generator.answers(prompts, replace(SAMPLED, top_p=0.01), SEEDS),
    ]
    assert first == generator.answers(prompts, SAMPLED, SEEDS)
    assert all(first != other for other in others)


def test_questions_about_one_document_share_its_one_copy(folder, generator, questions, monkeypatch):
    """As transformers answers each whole prompt; the document is read once, in one row."""
    head, tails, _ = questions
    read = []
    prefilled = generator._prefill
    monkeypatch.setattr(generator, "_prefill", lambda *given: read.append(given[1]) or prefilled(*given))
    answers = about(generator, head, tails, GREEDY, SEEDS)
    assert read == [[head]]
    expected = [plain_greedy(folder, generator, head + tail) for tail in tails]
    assert [answer.text for answer in answers] == expected and len(set(expected)) > 1
    assert about(generator, head, [], GREEDY, []) == []


def test_drafts_from_the_excerpt_change_no_greedy_answer(generator, questions):
    head, tails, drafts = questions
    plain = about(generator, head, tails, GREEDY, SEEDS)
    assert about(generator, head, tails, GREEDY, SEEDS, drafts=drafts) == plain


def test_a_drafted_answer_does_not_depend_on_its_neighbours(generator, questions):
    head, tails, drafts = questions
    drawn = SamplingConfig(temperature=1.0, max_new_tokens=12)
    first, second = about(generator, head, tails[:2], drawn, SEEDS[:2], drafts=drafts[:2])
    turned = about(generator, head, tails[2:0:-1], drawn, SEEDS[2:0:-1], drafts=drafts[2:0:-1])
    assert turned[1] == second != turned[0] != first


def test_an_answer_says_whether_it_ended_by_itself(generator, prompts):
    limit = replace(SAMPLED, temperature=3.0, max_new_tokens=120)
    answers = generator.answers(prompts * 3, limit, range(9))
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert answer.tokens < 120 if answer.finished else answer.tokens == 120
        assert "<|im_end|>" not in answer.text


def test_whole_documents_are_read_with_the_theta_of_generation_and_excerpts_with_the_checkpoint_s(
    folder, generator, prompts
):
    model = PolicyConfig(source=str(folder), dtype="float32", rope_theta=500.0)
    policy = Generator(config_for(folder, model=model), quiet=True)
    both = Generator(config_for(folder, model=replace(model, generation_rope_theta=2000.0)), quiet=True)
    assert [one.model.config.rope.theta for one in (generator, policy, both)] == [10000.0, 500.0, 2000.0]
    assert [one.short.config.rope.theta for one in (generator, policy, both)] == [10000.0] * 3
    assert policy.short.embed_VD[...] is policy.model.decoder.embed_VD[...]  # one copy of the weights
    head, tails = prompts[0][:-9], [prompts[0][-9:], prompts[1][-9:]]
    by_theta = {}
    for theta in (10000.0, 500.0):
        by_theta[theta] = [plain_greedy(folder, generator, head + tail, theta=theta) for tail in tails]
    assert by_theta[10000.0] != by_theta[500.0]
    short = policy.answers([head + tail for tail in tails], GREEDY, SEEDS[:2])
    assert [answer.text for answer in short] == by_theta[10000.0]
    assert [answer.text for answer in about(policy, head, tails, GREEDY, SEEDS[:2])] == by_theta[500.0]


def test_an_answer_that_was_cut_inside_a_character_ends_before_it(generator, prompts, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "caf\N{REPLACEMENT CHARACTER}")
    limit = replace(SAMPLED, temperature=3.0, max_new_tokens=60)
    said = {(answer.finished, answer.text) for answer in generator.answers(prompts * 3, limit, range(9))}
    assert said == {(True, "caf\N{REPLACEMENT CHARACTER}"), (False, "caf")}


def test_other_tokenizer_files_are_another_identity(folder, generator, tmp_path):
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "tokenizer_config.json":
            content = content.replace(b"<|im_end|>\\n", b"<|im_end|>")
            assert content != path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    changed = Generator(config_for(tmp_path), quiet=True).identity
    ours = generator.identity
    assert {key for key in ours if ours[key] != changed[key]} == {"model.template"}


def test_a_mesh_answers_as_one_device(folder, generator, prompts, questions):
    mesh = GenerationConfig(mesh=MeshConfig(data=2, context=2), prefill_chunk=64, attention_block=128, layout="stacked")
    spread = Generator(config_for(folder, generation=mesh), quiet=True)
    assert spread.answers(prompts, GREEDY, SEEDS) == generator.answers(prompts, GREEDY, SEEDS)
    head, tails, _ = questions
    expected = about(generator, head, tails, GREEDY, SEEDS)
    assert about(spread, head, tails, GREEDY, SEEDS) == expected


def test_several_documents_at_once_are_answered_as_each_alone(generator, questions):
    """With other numbers of questions, and none; of the rows that fill up nothing is told."""
    head, tails, drafts = questions
    drawn = SamplingConfig(temperature=1.0, max_new_tokens=12)
    other = head[:30] + head[60:] + head[30:60]
    asked = [About(head, tails[:1], drafts[:1]), About([], [], []), About(other, tails, drafts)]
    seeds = [SEEDS[:1], [], SEEDS]
    together = generator.answers_about(asked, drawn, seeds)
    alone = [generator.answers_about([one], drawn, [own])[0] for one, own in zip(asked, seeds, strict=True)]
    assert together == alone and [len(answers) for answers in together] == [1, 0, 3]
    assert together[0][0] != together[2][0]


@pytest.mark.parametrize("drafted", [False, True])
def test_what_was_compiled_ahead_is_what_answers_run(folder, questions, prompts, drafted):
    generator = Generator(config_for(folder, pairs=PairsConfig(batch=4, gamma=2)), quiet=True)
    generator.compile_short(SAMPLED, 4)
    generator.compile_long(GREEDY, 2, len(questions[0]), drafted=drafted)
    head, tails, drafts = questions
    asked = [
        About(head, tails, drafts if drafted else None),
        About(head[:-9], tails[:1], drafts[:1] if drafted else None),
    ]
    with compiled() as programs:
        generator.answers([*prompts, prompts[0]], SAMPLED, [1, 2, 3, 4])
        generator.answers_about(asked, GREEDY, [SEEDS, SEEDS[:1]])
    assert not programs
