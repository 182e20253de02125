# SPDX-License-Identifier: Apache-2.0
"""A model with known behaviour in the place of `Rapid`."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.conversation import Prompt
from rapid_jax.engine.request import Question
from rapid_jax.prompts import Reading
from rapid_jax.speculative.generate import Generation


class Stub:
    """Answers by `say(mode, document, question)`; notes what it was asked, in which groups."""

    def __init__(self, config: RapidConfig, say: Callable[[str, str, str], str]):
        self.config, self._say = config, say
        self.groups: list[tuple[str, int, list[str]]] = []
        codes = lambda text, **_: [ord(letter) for letter in text]  # noqa: E731
        tokenizer = SimpleNamespace(
            chat=lambda messages, **_: messages[-1]["content"],
            encode_template=codes,
            encode_quoted=codes,
            decode=lambda ids, **_: "".join(map(chr, ids)),
        )
        self.target = self.drafter = SimpleNamespace(tokenizer=tokenizer)
        self.loaded: list[str] = []  # modes

    def load(self, settings: RapidConfig | None = None) -> None:
        """Notes for which mode."""
        self.loaded.append((settings or self.config).speculation.mode)

    def answers(self, prompts: Sequence[Any], *, settings: RapidConfig, seeds: Sequence[int]) -> list[Any]:
        """One of each, with code points for tokens; the drafter reads all that it may retrieve from."""
        assert len(seeds) == len(prompts)
        mode, found = settings.speculation.mode, []
        for prompt in prompts:
            document, question, other = "", "", None
            if isinstance(prompt, Question):
                document, question, other = prompt.document, prompt.question, prompt.retrieve_from
            else:
                question = "".join(map(chr, prompt.ids))
            head, tail = ([ord(letter) for letter in text] for text in (document, question))
            drafts = Prompt([ord(letter) for letter in (other or document)], tail) if mode != "target" else None
            read = Reading(Prompt(head, tail), drafts, None, len(document), truncated=len(document) > 1000)
            found.append((question, self._answer(mode, settings, read, self._say(mode, document, question))))
        self.groups.append((mode, settings.sampling.max_new_tokens, [question for question, _ in found]))
        return [answer for _, answer in found]

    def _answer(self, mode: Any, settings: RapidConfig, read: Reading, text: str) -> Answer:
        tokens = [ord(letter) for letter in text]
        lists = {name: [0] for name in ("drafted", "accepted", "rejected", "rounds", "copied", "copied_accepted")}
        seconds = dict.fromkeys(("prepare_seconds", "compile_seconds", "decode_seconds"), 0.5)
        steps: dict[str, Any] = {"draft_steps": 0, "target_steps": 1, "gammas": {0: 1}}
        made = Generation(
            tokens=[tokens], origins=[[0] * len(tokens)], finish_reasons=["stop"], **lists, **steps, **seconds
        )
        return Answer(
            text=text,
            token_ids=tokens,
            origins=[0] * len(tokens),
            finish_reason="stop" if len(tokens) < settings.sampling.max_new_tokens else "length",
            mode=mode,
            eta=0.0,
            gamma=0,
            generation=made,
            reading=read,
            prefix_reused=False,
            seconds={"prefill": 1.0, "compile": 0.0, "decode": 0.5},
        )
