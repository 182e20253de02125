# SPDX-License-Identifier: Apache-2.0
"""A model with known behaviour in the place of `Rapid`."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.prompts import Prompt, Reading
from rapid_jax.speculative.generate import Generation


class Stub:
    """Answers by `say(mode, document, question)`; notes what it was asked, in which groups."""

    def __init__(self, config: RapidConfig, say: Callable[[str, str, str], str], groups: list | None = None):
        self.config, self._say = config, say
        self.groups: list[tuple[str, int, list[str]]] = [] if groups is None else groups
        codes = lambda text, **_: [ord(letter) for letter in text]  # noqa: E731
        tokenizer = SimpleNamespace(
            chat=lambda messages, now=None: messages[-1]["content"],
            encode_template=codes,
            encode_quoted=codes,
            decode=lambda ids, **_: "".join(map(chr, ids)),
        )
        self.target = SimpleNamespace(tokenizer=tokenizer)

    def load(self) -> None:
        """Nothing."""

    def with_config(self, config: RapidConfig) -> "Stub":
        """The same, under other settings."""
        return Stub(config, self._say, self.groups)

    def read(
        self,
        document: str,
        question: str,
        *,
        template: str | None = None,
        begins: str = "",
        retrieve_from: str | None = None,
    ) -> Reading:
        """The document and the question as code points; the drafter reads all that it may retrieve from."""
        del template, begins
        head, tail = ([ord(letter) for letter in text] for text in (document, question))
        short = [ord(letter) for letter in (retrieve_from or document)]
        drafts = Prompt(short, tail) if self.config.speculation.mode != "target" else None
        return Reading(Prompt(head, tail), drafts, None, len(document), truncated=len(document) > 1000)

    def answers(self, readings: Sequence[Reading], seeds: Sequence[int], *, kept: bool = True) -> list[Any]:
        """One of each."""
        del kept
        mode = self.config.speculation.mode
        texts = [("".join(map(chr, read.long.head)), "".join(map(chr, read.long.tail))) for read in readings]
        self.groups.append((mode, self.config.sampling.max_new_tokens, [question for _, question in texts]))
        return [self._answer(mode, read, self._say(mode, *text)) for read, text in zip(readings, texts, strict=True)]

    def _answer(self, mode: Any, read: Reading, text: str) -> Answer:
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
            finish_reason="stop" if len(tokens) < self.config.sampling.max_new_tokens else "length",
            mode=mode,
            eta=0.0,
            gamma=0,
            generation=made,
            selection=None,
            target_tokens=len(read.long.tokens),
            draft_tokens=0,
            document_tokens=read.document_tokens,
            prefix_reused=False,
            seconds={"prefill": 1.0, "compile": 0.0, "decode": 0.5},
        )
