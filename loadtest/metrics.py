"""The load test's own Prometheus metrics, in a registry of their own. They move when a request ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from loadtest.records import Record
from split_llama.errors import UsageError

PREFIX = "fl_llama_loadtest"
HOST = "127.0.0.1"
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class LiveMetrics:
    """Measured requests only, warm-up is left out. Latencies and amounts are those of answered requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=PREFIX, registry=self.registry, buckets=buckets)

        self.clients = Gauge("clients", "Concurrent clients", namespace=PREFIX, registry=self.registry)
        self.running = Gauge("requests_running", "Requests under way", namespace=PREFIX, registry=self.registry)
        self._requests = counter("requests", "Requests that ended: ok, or the error's class", ("outcome",))
        self._prompt = counter("prompt_tokens", "Tokens of answered prompts")
        self._output = counter("generation_tokens", "Tokens generated")
        self._up = counter("sent_bytes", "Bytes of frames sent to the server")
        self._down = counter("received_bytes", "Bytes of frames received from the server")
        self._trips = counter("round_trips", "Waits for the server")
        self._ttft = histogram("time_to_first_token_seconds", "From handing in the prompt", _REQUEST)
        self._inter_token = histogram("inter_token_latency_seconds", "Between two tokens of an answer", _TOKEN)
        self._total = histogram("request_latency_seconds", "From handing in the prompt to the last token", _REQUEST)

    def ended(self, record: Record) -> None:
        """Count a measured request that ended."""
        self._requests.labels(record.error or "ok").inc()
        if not record.answered:
            return
        self._prompt.inc(record.prompt_tokens)
        self._output.inc(record.output_tokens)
        self._trips.inc(record.round_trips)
        self._ttft.observe(record.ttft_ms / 1000)
        self._total.observe(record.total_ms / 1000)
        for gap in record.itl_ms:
            self._inter_token.observe(gap / 1000)
        if record.footprint is not None:
            self._up.inc(record.footprint.bytes_up)
            self._down.inc(record.footprint.bytes_down)

    @contextmanager
    def serve(self, port: int | None) -> Iterator[str | None]:
        """Serve `/metrics` on this machine while the block runs; gives the URL. Raises `UsageError` if it cannot."""
        if port is None:
            yield None
            return
        try:
            server, thread = start_http_server(port, HOST, self.registry)
        except OSError as error:
            raise UsageError(
                f"cannot serve metrics at {HOST} port {port}: {error.strerror or error}; "
                "--metrics-port 0 takes a free one"
            ) from error
        try:
            yield f"http://{HOST}:{server.server_port}/metrics"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
