"""What is known about one request, as it travels from an edge process to the parent: one JSON object per line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a session must have left in the server's counters.

    `prompt_rows` and `decode_rows` are positions of answered steps that the server is sure to count as prompt and as
    generation, `either_rows` those that may be either, `steps` all these steps. `open_rows` is how many further rows
    may have been sent and applied without an answer: 0 unless the request was broken off. Bytes are the session's
    frames, headers, OPEN and CLOSE included.
    """

    prompt_rows: int = 0
    decode_rows: int = 0
    either_rows: int = 0
    steps: int = 0
    open_rows: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are milliseconds since the prompt was handed in; `error` is a class name, `None` if answered.

    `footprint` is `None` when no session was opened, so that nothing was sent.
    """

    index: int
    process: int
    warmup: bool
    start_s: float
    prompt_tokens: int
    output_tokens: int = 0
    ttft_ms: float = 0.0
    itl_ms: list[float] = field(default_factory=list)
    total_ms: float = 0.0
    round_trips: int = 0
    error: str | None = None
    message: str = ""
    footprint: Footprint | None = None

    @property
    def answered(self) -> bool:
        """Say whether the whole answer came."""
        return self.error is None

    def to_json(self) -> dict[str, Any]:
        """Give a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Record:
        """Read what `to_json` gave."""
        footprint = None if raw["footprint"] is None else Footprint(**raw["footprint"])
        return cls(**raw | {"footprint": footprint})


def encode_line(event: str, **fields: Any) -> bytes:
    """Give one event as a line."""
    return json.dumps({"event": event} | fields, separators=(",", ":")).encode() + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """Read a line of `encode_line`. Raises `ValueError` for anything else."""
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        raise ValueError(f"expected an event, got {line[:80]!r}")
    return value
