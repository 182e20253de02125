# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus: vLLM's names where they mean the same, else the prefix rapid."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rapid_jax.answer import Answer
from rapid_jax.serve.interface import Engine

_LABEL = ("model_name",)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_LENGTHS = tuple(4**power for power in range(1, 11))  # tokens


class Metrics:
    """Counts what the server does; each server has its own registry."""

    def __init__(self, engine: Engine):
        registry, name = CollectorRegistry(), engine.models.name
        self._registry = registry

        def histogram(title: str, text: str, buckets: Iterable[float]) -> Histogram:
            found = Histogram(title, text, _LABEL, buckets=tuple(buckets), registry=registry)
            return found.labels(name)

        def counter(title: str, text: str) -> Counter:
            return Counter(title, text, _LABEL, registry=registry).labels(name)

        self.first = histogram("vllm:time_to_first_token_seconds", "From the request to its first token.", _FIRST)
        self.between = histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens; those of a round share the time since the round before.",
            _BETWEEN,
        )
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From the request to its end.", _WHOLE)
        self.prompts = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _LENGTHS)
        self.answers = histogram("vllm:request_generation_tokens", "Tokens of an answer.", _LENGTHS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of all prompts, cached ones too.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of all answers.")
        self._ended = Counter(
            "vllm:request_success", "Requests by how they ended.", (*_LABEL, "finished_reason"), registry=registry
        )
        self._refused = Counter(
            "rapid:requests_refused", "Requests that got no answer.", (*_LABEL, "status"), registry=registry
        )
        self._name = name
        registry.register(_OfEngine(engine))

    def ended(self, reason: str) -> None:
        """A request has ended: stop, length, or abort where it was taken back."""
        self._ended.labels(self._name, reason).inc()

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(self._name, str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is registered asks the engine nothing."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The figures of now."""
        stats, label = self._engine.stats(), (self._engine.models.name,)
        gauges = {
            "vllm:num_requests_running": ("Requests in rows.", stats.running),
            "vllm:num_requests_waiting": ("Requests in the queue.", stats.waiting),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABEL)
            gauge.add_metric(label, value)
            yield gauge
        counters = {
            "vllm:spec_decode_num_draft_tokens": ("Tokens proposed to the target.", stats.drafted),
            "vllm:spec_decode_num_accepted_tokens": ("Proposed tokens that the target took.", stats.accepted),
            "rapid:rounds": ("Rounds, summed over rows; tokens over rounds is tokens a round.", stats.rounds),
            "rapid:tokens": ("Tokens that rounds made, those after a stop text too.", stats.tokens),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=_LABEL)
            counter.add_metric(label, value)
            yield counter
        tiers = GaugeMetricFamily("rapid:kv_bytes", "Keys and values by where they are.", labels=(*_LABEL, "tier"))
        for tier, size in stats.kv_bytes.items():
            tiers.add_metric((*label, tier), size)
        yield tiers


class Watch:
    """The clock of one request."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._start, self._last = metrics, time.perf_counter(), None
        self._open = True

    def tokens(self, count: int) -> None:
        """So many tokens have come."""
        if count < 1:
            return
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first.observe(now - self._start)
        else:
            for _ in range(count):
                self._metrics.between.observe((now - self._last) / count)
        self._last = now

    def done(self, answer: Answer) -> None:
        """The answer is complete."""
        if self._open:
            self._open = False
            self._metrics.whole.observe(time.perf_counter() - self._start)
            self._metrics.prompts.observe(answer.target_tokens)
            self._metrics.answers.observe(len(answer.token_ids))
            self._metrics.prompt_tokens.inc(answer.target_tokens)
            self._metrics.generation_tokens.inc(len(answer.token_ids))
            self._metrics.ended(answer.finish_reason)

    def left(self) -> None:
        """Nobody waits for it any more."""
        if self._open:
            self._open = False
            self._metrics.ended("abort")

    def failed(self) -> None:
        """There will be no answer; `refused` counts the request where the client is told so by its status."""
        self._open = False
