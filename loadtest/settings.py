"""What a load test can be told. What shapes the edge is declared once, in `EdgeSettings`, and taken over by name."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.settings import EdgeSettings
from loadtest.workload import parse_lengths
from split_llama.errors import UsageError
from split_llama.settings import setting
from split_llama.transport.address import ServerAddress

SECTION = "loadtest"
DEFAULT_REQUESTS = 64
DEFAULT_PROMPT_TOKENS = "uniform:16-64"
LENGTHS = "N, uniform:A-B, or lognormal:MEDIAN,SIGMA,MAX"

_EDGE = {field.name: field for field in dataclasses.fields(EdgeSettings)}


def _edge(name: str, **changes: Any) -> Any:
    """Declare a field as the edge does; `default` and `help` may differ."""
    declared = _EDGE[name]
    metadata = dict(declared.metadata) | {"help": changes.get("help", declared.metadata["help"])}
    return dataclasses.field(default=changes.get("default", declared.default), metadata=metadata)


def _at_least(low: float, what: str) -> Callable[[float], None]:
    def check(value: float) -> None:
        if not low <= value < math.inf:
            raise ValueError(f"expected {what}")

    return check


def _above_zero(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError("expected seconds above 0")


def _port(value: int) -> None:
    if not 0 <= value < 65536:
        raise ValueError("expected a port between 0 and 65535 (0 takes any free one)")


@dataclass(frozen=True)
class LoadSettings:
    """The settings of one run; one object per process, never mutated."""

    server: str | None = _edge("server")
    allow_remote: bool = setting(
        False, "allow a server on another machine; only with its owner's consent, to anybody else it is an attack"
    )
    clients: int = setting(
        16, "concurrent clients, each with one request at a time", check=_at_least(1, "1 or more"), metavar="N"
    )
    processes: int = setting(
        1,
        "edge processes to spread the clients over; each has one connection and batches its own clients in A, C, head",
        check=_at_least(1, "1 or more"),
        metavar="N",
    )
    requests: int | None = setting(
        None,
        f"requests in all, warm-up not counted (default: {DEFAULT_REQUESTS} unless --duration is given)",
        check=_at_least(1, "1 or more"),
        metavar="N",
    )
    duration: float | None = setting(
        None, "start no request after so many seconds; those running are finished", check=_above_zero, metavar="S"
    )
    warmup: int = setting(
        1, "requests per process before measuring begins", check=_at_least(0, "0 or more"), metavar="N"
    )
    think_time: float = setting(
        0.0,
        "seconds a client waits between an answer and its next request",
        check=_at_least(0, "0 or more"),
        metavar="S",
    )
    request_timeout: float = setting(
        120.0, "a request that takes longer is given up and counts as failed", check=_above_zero, metavar="S"
    )
    prompt_tokens: str | None = setting(
        None,
        f"prompt lengths in tokens: {LENGTHS} (default: {DEFAULT_PROMPT_TOKENS}); tokens are random",
        check=parse_lengths,
        metavar="DIST",
    )
    prompts: Path | None = setting(None, "text file with one prompt per line instead of random tokens", metavar="FILE")
    max_new_tokens: str = setting("32", f"answer lengths in tokens: {LENGTHS}", check=parse_lengths, metavar="DIST")
    stop_at_eos: bool = setting(False, "let the model end answers early; by default the length drawn is generated")
    seed: int = setting(0, "seed of the workload: prompts, lengths and sampling", metavar="N")
    metrics_port: int | None = setting(
        None,
        "serve Prometheus metrics at 127.0.0.1 while running; 0 takes any free port and prints it",
        check=_port,
        metavar="PORT",
    )
    json: str | None = setting(
        None, "write the whole report there; - is stdout, the table then goes to stderr", metavar="PATH"
    )
    check: bool = setting(True, "compare the server's counters with our own; a difference makes the exit code 1")
    model: str | None = _edge("model")
    api_key: str | None = _edge("api_key")
    ca_certs: Path | None = _edge("ca_certs")
    transport: str = _edge("transport")
    reconnect_seconds: float = _edge("reconnect_seconds", default=10.0)
    partition: str = _edge("partition")
    noise: str = _edge("noise")
    clip: str = _edge("clip")
    codec: str = _edge("codec")
    allow_embedding_states: bool = _edge("allow_embedding_states")
    accept_new_weights: bool = _edge("accept_new_weights")
    device: str = _edge("device")
    dtype: str = _edge("dtype")
    threads: int | None = _edge("threads", default=1, help="CPU threads of each process")
    temperature: float | None = _edge("temperature")
    top_p: float | None = _edge("top_p")
    top_k: int | None = _edge("top_k")
    cache_dir: Path | None = _edge("cache_dir")
    state_dir: Path | None = _edge("state_dir")

    def validate(self) -> None:
        """Refuse, before anything is sent, what does not go together. Raises `UsageError`."""
        address = ServerAddress.parse(self.edge().server_url())
        if not self.allow_remote and not is_loopback(address):
            raise UsageError(
                f"{address.base} is not on this machine. A load test against somebody else's server is an attack on "
                "it; if it is yours, or its owner agreed, say --allow-remote"
            )
        if self.prompts is not None and self.prompt_tokens is not None:
            raise UsageError("--prompts takes the lengths from the file: leave --prompt-tokens out, or --prompts")
        if self.processes > self.clients:
            raise UsageError(f"{self.processes} processes for {self.clients} clients: each process needs at least one")
        if self.json not in (None, "-") and not Path(str(self.json)).absolute().parent.is_dir():
            raise UsageError(f"--json {self.json}: there is no such folder")

    def edge(self) -> EdgeSettings:
        """Give the settings of an edge process."""
        own = {field.name for field in dataclasses.fields(self)}
        # Lengths, seeds and deadlines are per request here.
        shared = (own & _EDGE.keys()) - {"max_new_tokens", "seed", "request_timeout"}
        # One round trip per token: what a server carries is counted in steps.
        return EdgeSettings(speculate="off", **{name: getattr(self, name) for name in shared})

    def num_requests(self) -> int | None:
        """Give the number of requests to make; `None` when only the duration bounds the run."""
        return self.requests or (None if self.duration is not None else DEFAULT_REQUESTS)

    def to_json(self) -> dict[str, Any]:
        """Give all values, the API key included, so that `from_json` can rebuild this in another process."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoadSettings:
        """Rebuild what `to_json` gave."""
        paths = {
            name: Path(values[name])
            for name in ("prompts", "ca_certs", "cache_dir", "state_dir")
            if values[name] is not None
        }
        return cls(**values | paths)

    def shown(self) -> dict[str, Any]:
        """Give all values for a report, secrets masked."""
        values = self.to_json()
        return values | ({"api_key": "********"} if self.api_key is not None else {})


def is_loopback(address: ServerAddress) -> bool:
    """Say whether an address names this machine without asking a resolver, whose answer may change."""
    host = address.authority.rpartition(":")[0] if address.authority.rpartition(":")[2].isdigit() else address.authority
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
