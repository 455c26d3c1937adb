"""Prometheus metrics of the gateway, in a registry of their own. No label ever holds text, ids or keys."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge_client.generate import GenerationStats

PREFIX = "fl_llama_edge"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)


class GatewayMetrics:
    """All that is counted; the event loop counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=PREFIX, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "HTTP requests by route and status", ("route", "status"))
        self.answers = counter("answers", "Answers by how they ended", ("ended",))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answers that were begun")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens whose rows the server had already")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.round_trips = counter("round_trips", "Waits for the server")
        self.bytes_up = counter("sent_bytes", "Bytes of frames sent to the server for answers")
        self.bytes_down = counter("received_bytes", "Bytes of frames received for answers")
        self.drafted = counter("drafted_tokens", "Guessed tokens sent to be checked")
        self.accepted = counter("accepted_tokens", "Guessed tokens that were right")
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From the request for an answer, waiting included, to its first token",
            _FIRST,
        )
        self.inter_token = histogram("inter_token_latency_seconds", "Between tokens of an answer", _TOKEN)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever somebody asks."""
        Gauge(name, text, namespace=PREFIX, registry=self.registry).set_function(read)

    def count_prompt(self, stats: GenerationStats) -> None:
        """Count the prompt of an answer; of several answers to one prompt that of the first."""
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.cached_tokens.inc(stats.cached_tokens)

    def count(self, stats: GenerationStats, tokens: int, ended: str) -> None:
        """Count an answer that is over, however it ended."""
        self.answers.labels(ended).inc()
        self.generation_tokens.inc(tokens)
        self.round_trips.inc(stats.round_trips)
        self.bytes_up.inc(stats.bytes_up)
        self.bytes_down.inc(stats.bytes_down)
        self.drafted.inc(stats.drafted)
        self.accepted.inc(stats.accepted)

    def render(self) -> bytes:
        """Give all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
