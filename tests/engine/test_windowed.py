# SPDX-License-Identifier: Apache-2.0
"""Documents of a model whose layers have a window: kept in three tiers, asked about side by side, never begun."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.models import Models
from rapid_jax.engine.request import Done, Question, Request
from rapid_jax.engine.service import RunningEngine
from rapid_jax.engine.warm_up import WarmUp
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.speculative import window_layout
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from rapid_jax.speculative.window_layout import WindowLayout
from tests.compiled import compiled
from tests.engine.test_engine import Heard
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

WINDOW = 40
DOCUMENTS = [words(90, seed=seed) for seed in range(2)]
LONGER = f"{DOCUMENTS[0]}\n\n{words(60, seed=7)}"  # what begins as a document that is kept
ASKED = [(DOCUMENTS[0], "w12 w34?"), (DOCUMENTS[1], "w1?"), (DOCUMENTS[0], "w3 w4 w5?"), (LONGER, "w80 w2?")]


@pytest.fixture
def config(tmp_path, monkeypatch) -> RapidConfig:
    monkeypatch.setattr(window_layout, "_UNIT", 8)
    target = save_decoder(tmp_path / "model")
    stated = json.loads((target / "config.json").read_text())
    stated |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
    (target / "config.json").write_text(json.dumps(stated))
    return RapidConfig(
        models=ModelsConfig(target=str(target), encoder=str(encoders.save(tmp_path / "encoder", "bert"))),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(mode="lossless", gamma=3, lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.9, max_new_tokens=12),
        compute=ComputeConfig(prefill_chunk=64),
        cache=CacheConfig(folder=str(tmp_path / "cache"), prefixes=True, programs=False, host_gib=1.0),
    )


def requests(config: RapidConfig) -> list[Request]:
    return [Request.of(Question(*each), config) for each in ASKED]


def answers(config: RapidConfig, *, together: bool) -> tuple[list[list[int]], Engine]:
    engine = Engine(config, quiet=True, prefill_first=False)
    heard = []
    for request in requests(config):
        heard.append(Heard(engine, request))
        if not together:
            engine.run([heard[-1].ticket])
    engine.run([each.ticket for each in heard])
    return [each.tokens for each in heard], engine


def test_answers_are_those_of_caches_that_keep_everything(config, monkeypatch):
    """One by one and side by side; a document that begins as another is read from its beginning."""
    alone, engine = answers(config, together=False)
    assert engine.models.target.config.window_of == (WINDOW, WINDOW)
    kept = engine.prefixes.bytes()["device"]
    assert answers(config, together=True)[0] == alone
    monkeypatch.setattr(WindowLayout, "kept", property(lambda self: self.chunks))
    whole, engine = answers(config, together=False)
    assert whole == alone and kept < 0.35 * engine.prefixes.bytes()["device"]


def test_a_document_comes_back_from_disk(config: RapidConfig):
    first, engine = answers(config, together=False)
    assert engine.prefixes.save() == 0
    assert len(list((Path(str(config.cache.folder)) / "prefixes").glob("*/*/near_k_BKSH"))) == 3
    fresh = Engine(config, quiet=True, prefill_first=False)
    heard = Heard(fresh, requests(config)[1])
    fresh.run([heard.ticket])
    assert heard.tokens == first[1] and heard.last.answer.prefix_reused  # type: ignore[union-attr]


def test_after_a_warm_up_documents_of_other_lengths_compile_nothing(config: RapidConfig):
    config = replace(
        config, speculation=replace(config.speculation, mode="target"), cache=replace(config.cache, prefixes=False)
    )
    engine = RunningEngine(config, Models(config, quiet=True), warm=WarmUp((220,)))  # as words(90) has
    jax.clear_caches()  # of this process: programs of the same shapes would not be compiled
    engine.warm_up(lambda text: None)
    for seed, length in enumerate((90, 70, 45)):
        with compiled() as found:
            heard = Heard(engine, Request.of(Question(words(length, seed=seed), "w12 w34?"), config))
            engine.run([heard.ticket])
        assert isinstance(heard.last, Done) and found == []
