"""The server's own time, where its metrics tell: they need no key, and count all sessions together."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from edge_client.settings import EdgeSettings
from split_llama.transport.address import ServerAddress
from split_llama.transport.trust import tls_context

SECONDS = 5.0
STEPS = "fl_llama_server_overhead_seconds_count"
# A step's time at the server: the model's, and all else from its arrival to its reply.
SUMS = ("fl_llama_model_pass_seconds_sum", "fl_llama_server_overhead_seconds_sum")


@dataclass(frozen=True, slots=True)
class ServerClock:
    """Steps answered since the server started, and the seconds that they took there."""

    steps: float
    seconds: float

    @classmethod
    def read(cls, settings: EdgeSettings) -> ServerClock | None:
        """Ask the server. Blocking; `None` when it does not tell, which is no fault: a proxy may hide its metrics."""
        base = ServerAddress.parse(settings.server_url()).base
        context = tls_context(settings.ca_certs)
        try:
            with httpx.Client(timeout=SECONDS, verify=context if context is not None else True) as client:
                response = client.get(f"{base}/metrics")
        except (httpx.HTTPError, httpx.InvalidURL):
            return None
        return cls.parse(response.text) if response.status_code == 200 else None

    @classmethod
    def parse(cls, text: str) -> ServerClock | None:
        """Read Prometheus' text format; `None` when a figure is missing."""
        figures: dict[str, float] = {}
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name in (STEPS, *SUMS):
                try:
                    figures[name] = float(value.split()[0])
                except (ValueError, IndexError):
                    return None
        if len(figures) < 1 + len(SUMS):
            return None
        return cls(figures[STEPS], sum(figures[name] for name in SUMS))

    def since(self, before: ServerClock) -> ServerClock:
        """Give what came to it since `before`."""
        return ServerClock(self.steps - before.steps, self.seconds - before.seconds)

    def per_step(self, prompt: ServerClock, steps: int) -> float | None:
        """Give the mean of the steps behind a prompt, `self` being those of a whole answer and `prompt` the prompt's.

        `None` unless they are as many as `steps`: then others were also served, and what is whose is not known.
        """
        if steps < 1 or round(self.steps - prompt.steps) != steps:
            return None
        return max(0.0, (self.seconds - prompt.seconds) / steps)
