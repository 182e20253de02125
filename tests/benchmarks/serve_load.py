# SPDX-License-Identifier: Apache-2.0
"""A running `rapid serve` under load: questions that arrive as a Poisson process, against the same ones one by one.

rapid serve --model smollm2 --warm-tokens 1024 --warm-rows 8
python -m tests.benchmarks.serve_load --url http://127.0.0.1:8000 --documents 1 8

Each question is about one of so many documents, which are handed in and asked about once before anything is timed. Two
JSON lines for each number of documents: one by one, then at the rate. Times are of the client. Several tokens may come
at once: "between pieces" is the time between two that come apart, "a token" that from the first to the last token of an
answer through the tokens behind the first.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

SUBJECTS = "The harbour", "A clerk", "The winter", "An old map", "The council", "Her brother", "The northern road"
VERBS = "was kept from", "had lost", "remembered", "came before", "paid for", "was named after", "waited for"
OBJECTS = "the ships", "a quarrel", "the mill", "its own bridge", "the first letter", "the tax of spring", "a long war"


@dataclass
class Answer:
    """What a client saw of one answer."""

    start: float
    at: list[float] = field(default_factory=list)  # when its pieces came
    tokens: int = 0
    error: str = ""


def document(seed: int, tokens: int) -> str:
    """A text of about so many tokens, another for each seed."""
    generator = random.Random(seed)
    sentences = []
    for number in range(tokens // 14):
        words = (generator.choice(words) for words in (SUBJECTS, VERBS, OBJECTS))
        sentences.append(f"{number}. {' '.join(words)} in {generator.randrange(1500, 1990)}.")
    return " ".join(sentences)


async def ask(http: httpx.AsyncClient, options: argparse.Namespace, model: str, id: str, number: int) -> Answer:
    """One streamed answer."""
    question = f"What is said in sentence {number % 40}, and what does it have to do with the one before?"
    body = {"model": model, "messages": [{"role": "user", "content": question}], "document": id, "seed": number}
    body |= {"max_tokens": options.tokens, "temperature": options.temperature}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = Answer(time.perf_counter())
    async with http.stream("POST", "/v1/chat/completions", json=body) as got:
        if got.status_code != 200:
            answer.error = (await got.aread()).decode()[:200]
            return answer
        async for line in got.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.error = event["error"]["message"]
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                answer.at.append(time.perf_counter())
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
    return answer


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds; of no values none."""
    ranked = sorted(values)
    return {
        f"p{part}": round(1000 * ranked[min(len(ranked) * part // 100, len(ranked) - 1)], 1) if ranked else None
        for part in (50, 99)
    }


def summary(answers: Sequence[Answer], wall: float) -> dict[str, object]:
    """The figures of a run."""
    good = [answer for answer in answers if not answer.error and answer.at]
    several = [one for one in good if one.tokens > 1]
    pieces = [later - earlier for one in good for earlier, later in zip(one.at, one.at[1:], strict=False)]
    return {
        "answers": len(good),
        "failed": len([answer for answer in answers if answer.error]),
        "first_token_ms": quantiles([one.at[0] - one.start for one in good]),
        "between_pieces_ms": quantiles(pieces),
        "a_token_ms": quantiles([(one.at[-1] - one.at[0]) / (one.tokens - 1) for one in several]),
        "tokens_per_s": round(sum(one.tokens for one in good) / wall, 2),
        "seconds": round(wall, 2),
    }


async def measure(http: httpx.AsyncClient, options: argparse.Namespace, model: str, count: int) -> None:
    """Both runs over so many documents."""
    ids = []
    for seed in range(count):
        got = await http.post("/v1/documents", json={"text": document(options.seed + seed, options.document_tokens)})
        ids.append(got.raise_for_status().json()["id"])
        first = await ask(http, options, model, ids[-1], seed)
        if first.error:
            raise SystemExit(f"document {seed}: {first.error}")
    generator = random.Random(options.seed)
    asked = [(generator.choice(ids), number) for number in range(options.requests)]
    waits = [generator.expovariate(options.rate) for _ in asked]
    start = time.perf_counter()
    answers = [await ask(http, options, model, *one) for one in asked]
    named = {"documents": count, "document_tokens": options.document_tokens, "requests": options.requests}
    print(json.dumps(named | {"arrivals": "one by one"} | summary(answers, time.perf_counter() - start)), flush=True)
    start, running = time.perf_counter(), []
    for wait, one in zip(waits, asked, strict=True):
        await asyncio.sleep(wait)
        running.append(asyncio.create_task(ask(http, options, model, *one)))
    answers = await asyncio.gather(*running)
    arrivals = f"Poisson, {options.rate:g} a second"
    print(json.dumps(named | {"arrivals": arrivals} | summary(answers, time.perf_counter() - start)), flush=True)


async def run(options: argparse.Namespace) -> None:
    """All numbers of documents, one after the other."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600, limits=limits) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        for count in options.documents:
            await measure(http, options, model, count)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server; its key in $OPENAI_API_KEY")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--document-tokens", type=int, default=900)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
