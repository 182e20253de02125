# SPDX-License-Identifier: Apache-2.0
"""What every suite yields: a document, a question about it, and the answers that count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rapid_jax.runtime.storage import AnyPlace


@dataclass(frozen=True)
class Sample:
    """One question. Equal arguments of a suite give equal samples, ids included."""

    id: str  # unique in its suite: TASK/LENGTH/NUMBER, or what the benchmark calls it
    suite: str
    task: str
    document: str
    question: str  # all that the model is asked behind the document; of multiple choice with the choices
    answers: tuple[str, ...]  # what `metric` compares with
    metric: str  # a name in scoring.METRICS
    max_new_tokens: int
    length: int | None = None  # tokens of prompt and answer that it was made for; None: it has the length it has
    template: str | None = None  # the user's message, with {document} and {question}; None: the settings' own
    begins: str = ""  # what the model's answer is made to begin with (RULER's answer prefix)
    depth: float | None = None  # where the (first) needle or gold passage lies: 0 the start, 1 the end
    tags: Mapping[str, str] = field(default_factory=dict)  # splits of the benchmark: difficulty, length class, domain
    # A second message with {answer} for the first answer, on its own, without the document; its answer counts.
    then: str | None = None
    then_tokens: int = 128  # of that answer, at most


@dataclass(frozen=True)
class SuiteOptions:
    """What is asked of a suite. A suite that makes its texts uses all of it, one that reads a file what applies."""

    tasks: tuple[str, ...] = ()  # empty: all of the suite
    lengths: tuple[int, ...] = ()
    samples: int | None = None  # a task and length; None: the suite's own number
    depths: tuple[float, ...] = ()  # of needle: empty: the suite's own grid
    data: AnyPlace | None = None  # the benchmark's file or folder
    text: AnyPlace | None = None  # a text file, or a folder of them, that haystacks are made of
    seed: int = 0


# Tokens of the whole prompt of a sample (chat template and all) and of the longest answer to it.
Measure = Callable[[Sample], int]
