# SPDX-License-Identifier: Apache-2.0
"""The real SmolLM2: temperature 0 is transformers' greedy `generate`, token for token, whatever the drafter says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rapid_jax.model.convert import convert
from rapid_jax.model.load import load_model
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.prefill import prefill

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences how a bicycle stays upright.",
    "Write the past tense of: go, see, take, think.",
)
NEW_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def compiled_for_use():
    """Programs of a real model run for seconds: without XLA's passes longer than the passes take."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", layout="stacked", dtype="float32", quiet=True)


@pytest.fixture(scope="module")
def prompts(smollm2):
    chats = [smollm2.tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [smollm2.tokenizer.encode(chat) for chat in chats]


@pytest.fixture(scope="module")
def greedy(smollm2, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    convert("smollm2", folder, "float32", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(smollm2.tokenizer.stop_ids),
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def test_greedy_is_that_of_transformers_under_a_bad_drafter(smollm2, prompts, greedy):
    decoder, dtype = smollm2.decoder, jnp.dtype("float32")
    # The drafter answers another question each time: it is wrong most of the time.
    others = prompts[1:] + prompts[:1]
    target = Prompted(
        decoder,
        prompts,
        prefill(decoder, [prompt[:-1] for prompt in prompts], chunk=64, dtype=dtype),
        [len(prompt) - 1 for prompt in prompts],
    )
    drafter = Prompted(
        decoder,
        others,
        prefill(decoder, [prompt[:-2] for prompt in others], chunk=64, dtype=dtype),
        [len(prompt) - 2 for prompt in others],
    )
    made = generate(
        target,
        drafter,
        speculation=SpeculationConfig(mode="rapid", eta=10, gamma=4, lookup="on", transfer_temperature=None),
        sampling=SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS),
        stops=smollm2.tokenizer.stop_ids,
        texts=prompts,
    )
    assert made.tokens == greedy
    assert len({tuple(tokens) for tokens in greedy}) == len(QUESTIONS)
    assert 0 < np.sum(made.accepted) < 0.5 * np.sum(made.drafted)
