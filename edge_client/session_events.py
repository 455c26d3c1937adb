"""What a frame from the server meant for its session: the events that `SessionState` gives."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.step_log import EncodedRows
from split_llama.errors import FlLlamaError


@dataclass(frozen=True, slots=True)
class Answer:
    """Step `token`, whose positions end before `end`, was answered; `rows` is `None` when none were asked for."""

    token: int
    end: int
    rows: EncodedRows | None


@dataclass(frozen=True, slots=True)
class Retry:
    """The server refused for now: call `retry` after `delay_ms`."""

    delay_ms: int
    error: FlLlamaError


@dataclass(frozen=True, slots=True)
class Failed:
    """The session is over."""

    error: FlLlamaError


@dataclass(frozen=True, slots=True)
class Closed:
    """The server confirmed the CLOSE."""


@dataclass(frozen=True, slots=True)
class Redirected:
    """The session's place is at another server now: connect there and `attach`."""

    address: str


Event = Answer | Retry | Failed | Closed | Redirected
