# SPDX-License-Identifier: Apache-2.0
"""One target and drafters of different quality, three questions, and how to answer them.

Everything here has the same shapes, so that tests share compiled programs: prompts of the same number of chunks, one
set of stop tokens, limits of the same bucket.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest

from rapid_jax.attention.decoding import by_tpu_kernel
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.storage import working_place
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Generation, generate
from tests.bucket_server import BUCKET
from tests.reference import greedy
from tests.speculative.models import Weights, next_logits, prompted

VOCABULARY = 24
LIMIT = 24


def _random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


@dataclass(frozen=True)
class Questions:
    """Three rows; the drafter's prompt of each is another one, as retrieved text is not the document."""

    weights: Weights
    target: Decoder
    drafter: Decoder  # agrees with the target sometimes
    prompts: list[list[int]]
    draft_prompts: list[list[int]]
    greedy: list[list[int]]  # of LIMIT tokens, without a stop
    stop: int  # ends the greedy answers at different places, one of them not at all

    def until_stop(self, limit: int = LIMIT) -> list[list[int]]:
        """The greedy answers."""
        cut = [answer.index(self.stop) + 1 if self.stop in answer else LIMIT for answer in self.greedy]
        return [answer[: min(end, limit)] for answer, end in zip(self.greedy, cut, strict=True)]


@pytest.fixture(scope="session")
def questions() -> Questions:
    weights = Weights.lively(VOCABULARY)
    target, drafter = weights.decoder(), weights.perturbed(0.1).decoder()
    prompts = _random_prompts(0, (33, 20, 27))
    answers = [greedy(next_logits(target), prompt, LIMIT) for prompt in prompts]
    assert all(len(set(answer)) > 5 for answer in answers), "the model was meant to be lively"
    ends = {
        token: [answer.index(token) if token in answer else LIMIT for answer in answers] for token in range(VOCABULARY)
    }
    stop = max(ends, key=lambda t: (LIMIT in ends[t]) + len({e for e in ends[t] if 3 < e < LIMIT}))
    assert sum(end < LIMIT for end in ends[stop]) == 2 and len(set(ends[stop])) == 3, ends
    return Questions(weights, target, drafter, prompts, _random_prompts(1, (19, 24, 30)), answers, stop)


@pytest.fixture(scope="session")
def answer(questions: Questions) -> Callable[..., Generation]:
    """`answer(speculation, sampling)`: the three questions answered; every part may be replaced.

    `int8`: over quantised keys and values of all prompts.
    """

    def run(
        speculation: SpeculationConfig,
        sampling: SamplingConfig,
        *,
        rows: Sequence[int] = (0, 1, 2),
        target: Decoder | None = None,
        drafter: Decoder | None = None,
        draft_prompts: Sequence[Sequence[int]] | None = None,
        stops: Sequence[int] | None = None,
        texts: Sequence[Sequence[int]] = (),
        seeds: Sequence[int] | None = None,
        int8: bool = False,
        **more,
    ) -> Generation:
        ours = draft_prompts or questions.draft_prompts
        return generate(
            prompted(target or questions.target, [questions.prompts[row] for row in rows], int8=int8),
            prompted(drafter or questions.drafter, [ours[row] for row in rows], int8=int8),
            speculation=speculation,
            sampling=sampling,
            stops=(questions.stop,) if stops is None else stops,
            texts=[texts[row] for row in rows] if texts else (),
            seeds=seeds,
            **more,
        )

    return run


@pytest.fixture
def from_stacks(monkeypatch) -> Iterator[list[Strategy]]:
    """Decoding as on TPUs, from stacks of layers, in plain XLA; every strategy that was asked for it."""
    asked: list[Strategy] = []

    def chosen(self: Strategy):
        asked.append(self)
        return partial(by_tpu_kernel, block=self.block)

    monkeypatch.setattr(Strategy, "decodes_from_stack", True)
    monkeypatch.setattr(Strategy, "chosen_decode", chosen)
    jax.clear_caches()  # strategies are equal that decode otherwise
    yield asked
    jax.clear_caches()


@pytest.fixture
def place(bucket, request):
    """A folder in the bucket that no other test uses."""
    return working_place(f"gs://{BUCKET}/cache-{request.node.name.replace('[', '-').replace(']', '')}", "cache.folder")
