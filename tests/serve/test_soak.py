# SPDX-License-Identifier: Apache-2.0
"""Hundreds of short requests that come, stream, hang up and are taken back: nothing of them is left.

`--fuzz 500` is an hour's worth.
"""

import contextlib
import ctypes
import gc
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.models import Models
from rapid_jax.engine.service import RunningEngine
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from tests.compiled import compiled
from tests.retrieval import encoders
from tests.serve.conftest import KEYS, Running, running
from tests.tiny_models import save_decoder, words

REQUESTS = 100  # in a phase; times what --fuzz says in the one that is measured
CLIENTS = 2  # at once: few sizes of lanes, so few programs
LIMIT = 10  # tokens of an answer
MOST_PHASES = 8  # until one compiles nothing; which programs are needed is a matter of who comes when
MOST_GROWTH = 4 << 20  # bytes that a phase may leave behind, however long it is; of 2,800 requests 3 MiB were left
DOCUMENTS = [words(90, seed=seed) for seed in range(3)]


class Unwarmed(RunningEngine):
    """Compiles when it is asked: the first phase warms it up."""

    def warm_up(self, report) -> None:
        del report


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tiny")
    target = save_decoder(folder / "model", sizes={"num_hidden_layers": 1})
    config = RapidConfig(
        models=ModelsConfig(target=str(target), encoder=str(encoders.save(folder / "encoder", "bert"))),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(gamma=2, lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.9, max_new_tokens=LIMIT),
        compute=ComputeConfig(prefill_chunk=64),
        cache=CacheConfig(folder=str(folder / "cache"), prefixes=False, programs=False),
    )
    with running(Unwarmed(config, Models(config, quiet=True)), KEYS, config=config, drain_seconds=10) as found:
        yield found


def resident() -> int:
    """Bytes of memory that this process has, without what it has freed and not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def body(generator: random.Random, documents: list[str]) -> dict:
    """A question; every setting in it is data of the same programs."""
    asked = {"model": "model", "messages": [{"role": "user", "content": f"w{generator.randrange(90)} w2?"}]}
    asked |= {"document": generator.choice(documents), "seed": generator.randrange(1 << 32)}
    asked |= {"temperature": generator.choice([0.5, 0.9, 1.3]), "max_tokens": generator.randint(1, LIMIT)}
    return asked | {"stop": generator.choice([None, ["w7"]])}


def one_request(http: httpx.Client, generator: random.Random, documents: list[str]) -> str:
    """Asks in one of the ways that clients have; how it went."""
    way, asked = generator.choice(["whole", "stream", "stream", "left", "left", "hung up"]), body(generator, documents)
    if way == "whole":
        got = http.post("/v1/chat/completions", json=asked)
        assert got.status_code == 200 and got.json()["usage"]["completion_tokens"] >= 1, got.text
        return way
    if way == "hung up":
        with contextlib.suppress(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=asked, timeout=generator.choice([0.01, 0.03, 0.1]))
        return way
    with http.stream("POST", "/v1/chat/completions", json=asked | {"stream": True, "max_tokens": LIMIT}) as got:
        assert got.status_code == 200
        lines = got.iter_lines()
        if way == "left":
            for _ in range(generator.randint(0, 5)):
                next(lines, None)
            return way
        assert [line for line in lines if line][-1] == "data: [DONE]"
    return way


def phase(found: Running, documents: dict[str, list[str]], seed: int, count: int) -> Counter:
    """So many requests by several clients at once, of either owner."""
    ways, faults = Counter(), []

    def ask(number: int) -> None:
        generator = random.Random(seed + number)
        try:
            for _ in range(count // CLIENTS):
                key = generator.choice(KEYS)
                with found.http(key) as http:
                    http.timeout = 60
                    ways[one_request(http, generator, documents[key])] += 1
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    return ways


def settled(found: Running) -> bool:
    """Whether all requests have left within a few seconds."""
    end = time.monotonic() + 10
    while not found.engine.is_idle and time.monotonic() < end:
        time.sleep(0.02)
    return found.engine.is_idle


def test_of_hundreds_of_requests_nothing_is_left(found: Running, request: pytest.FixtureRequest):
    engine, count = found.engine, REQUESTS * request.config.getoption("--fuzz")
    documents = {}
    for key in KEYS:
        with found.http(key) as http:
            documents[key] = [http.post("/v1/documents", json={"text": text}).json()["id"] for text in DOCUMENTS]
    fixed = body(random.Random(5), documents[KEYS[0]][:1])
    with found.http(KEYS[0]) as http:
        http.timeout = 60  # it compiles
        first = http.post("/v1/chat/completions", json=fixed).json()["choices"][0]["message"]
    for key in KEYS:  # each is read to its end once, whoever hangs up later
        with found.http(key) as http:
            http.timeout = 60
            for one in documents[key]:
                http.post("/v1/chat/completions", json=body(random.Random(6), [one])).raise_for_status()
    ways = phase(found, documents, 0, REQUESTS)
    for number in range(1, MOST_PHASES):
        assert settled(found)
        kept, before = engine.prefixes.bytes(), resident()
        with compiled() as programs:
            ways += phase(found, documents, 100 * number, count)
            assert settled(found)
        if not programs:
            break
    assert not programs, f"request after request compiles: {programs}"
    grown = resident() - before
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert engine._held == {} and engine._lanes == {} and engine.prefixes._tiers._held == {}
    assert engine.prefixes.bytes() == kept
    assert set(ways) == {"whole", "stream", "left", "hung up"} and min(ways.values()) > count // 20
    assert grown < MOST_GROWTH, f"{grown / 2**20:.1f} MiB more after {count} requests"
    with found.http(KEYS[0]) as http:
        assert http.post("/v1/chat/completions", json=fixed).json()["choices"][0]["message"] == first
