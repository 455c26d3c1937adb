"""Prometheus metrics of one server, in a registry of their own. No label ever holds text, ids or key names."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from serving.histogram import Histogram

PREFIX = "fl_llama"
# What becomes of a session's pages that are taken back: copied to host memory, or given up until the client's RESYNC.
SWAPPED, DROPPED = "swapped", "dropped"
_FINE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """All counters of the server. Counting costs about a microsecond, so the event loop does it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        counter = self.counter

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"{PREFIX}_{name}", text, buckets)
            self.registry.register(made)
            return made

        self.prompt_tokens = counter("prompt_tokens", "Positions applied in prompts and replays")
        self.generation_tokens = counter(
            "generation_tokens", "Positions applied in one-row and draft steps behind the prompt"
        )
        self.steps = counter("steps", "Steps applied")
        self.refusals = counter("refusals", "Refused steps, sessions and connections by error class", ("error",))
        self.faults = counter("pass_faults", "Passes that failed in the engine")
        self.evictions = counter("evictions", "Sessions whose pages were taken back for others, by kind", ("kind",))
        for kind in (SWAPPED, DROPPED):
            self.evictions.labels(kind)
        self.swap_ins = counter("swap_ins", "Sessions brought back from host memory")
        self.out_of_memory = counter("out_of_memory", "Passes that failed for want of memory")
        self.sessions_opened = counter("sessions_opened", "Sessions opened, attached anew or forked")
        self.connections_opened = counter("connections_opened", "Connections accepted")
        self.bytes_in = counter("received_bytes", "Bytes of frames received")
        self.bytes_out = counter("sent_bytes", "Bytes of frames sent")
        self.first_token = histogram(
            "time_to_first_token_seconds", "First step of a session until all that was sent with it is answered", _FIRST
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds",
            "Between a session's replies to one-row or draft steps",
            _TOKEN,
        )
        self.overhead = histogram(
            "server_overhead_seconds",
            "From a step's arrival, or the end of the pass that held it up, to its reply, less the model's time",
            _FINE,
        )
        self.pass_seconds = histogram("model_pass_seconds", "One pass over the hosted blocks", _TOKEN)
        self.pass_rows = histogram("batch_rows", "Rows in one pass", _ROWS)
        self.pass_sequences = histogram("batch_sequences", "Sessions in one pass", _ROWS)

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        """Add a counter."""
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever somebody asks."""
        Gauge(name, text, namespace=PREFIX, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """Give all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
