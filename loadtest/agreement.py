"""Do the server's counters say what our own say? Pure: text and numbers in, a verdict out.

The server counts a step when it applies it. It cannot know where a prompt ends: steps of several rows are prompt
tokens, and those of one row generation tokens, once the session had been answered all it had sent. So a prompt's later
step of one row (the 129th token, say) may count as either; the two counters then have a range, and their sum is exact.
The last token of an answer is never sent. We count in the same way, from what was answered (`runner.footprint`).

Every session that ended well has an exact count. One that was broken off has a range, because the server may have
applied steps whose answers we never read; bytes cannot be bounded then, and are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from loadtest.records import Record
from split_llama.errors import NotAServer

CONNECTIONS = "fl_llama_connections_opened_total"
SESSIONS = "fl_llama_sessions_opened_total"
STEPS = "fl_llama_steps_total"
PROMPT = "fl_llama_prompt_tokens_total"
GENERATION = "fl_llama_generation_tokens_total"
RECEIVED = "fl_llama_received_bytes_total"
SENT = "fl_llama_sent_bytes_total"
EVICTIONS = "fl_llama_evictions_total"
POSITIONS = "prompt and generation tokens together"
COUNTERS = (CONNECTIONS, SESSIONS, STEPS, PROMPT, GENERATION, RECEIVED, SENT)


@dataclass(frozen=True, slots=True)
class Line:
    """One counter: what we expect it to have grown by (`low` to `high`, inclusive) and what it did grow by."""

    counter: str
    low: float
    high: float
    server: float

    @property
    def agrees(self) -> bool:
        """Say whether the server's number is possible."""
        return self.low <= self.server <= self.high


@dataclass(frozen=True, slots=True)
class Agreement:
    """The verdict: the counters compared, and what an operator should know about them."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    checked: bool = True

    @property
    def agrees(self) -> bool:
        """Say whether all counters were compared and agree."""
        return self.checked and all(line.agrees for line in self.lines)


class Ledger:
    """Our own counts: all requests of all processes, warm-up and failed ones included."""

    def __init__(self, connections: int, hello_up: int, hello_down: int) -> None:
        self.broken_off = 0
        self._low = dict.fromkeys((*COUNTERS, POSITIONS), 0)
        self._open_rows = 0
        self._either_rows = 0
        self._low[CONNECTIONS] = connections
        self._low[RECEIVED] = connections * hello_up
        self._low[SENT] = connections * hello_down

    def add(self, record: Record) -> None:
        """Count a request that ended."""
        footprint = record.footprint
        if footprint is None:
            return
        if record.answered:
            self._low[SESSIONS] += 1
        else:
            self.broken_off += 1
        self._low[STEPS] += footprint.steps
        self._low[PROMPT] += footprint.prompt_rows
        self._low[GENERATION] += footprint.decode_rows
        self._low[POSITIONS] += footprint.prompt_rows + footprint.decode_rows + footprint.either_rows
        self._low[RECEIVED] += footprint.bytes_up
        self._low[SENT] += footprint.bytes_down
        self._open_rows += footprint.open_rows
        self._either_rows += footprint.either_rows

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Give for each counter that can be compared the least and the most it may have grown by."""
        room = dict.fromkeys((STEPS, POSITIONS), self._open_rows) | {SESSIONS: self.broken_off}
        room |= dict.fromkeys((PROMPT, GENERATION), self._open_rows + self._either_rows)
        bounds = {name: (float(low), float(low + room.get(name, 0))) for name, low in self._low.items()}
        if self.broken_off:
            del bounds[RECEIVED], bounds[SENT]
            # The edge may have connected again.
            bounds[CONNECTIONS] = (bounds[CONNECTIONS][0], math.inf)
        return bounds


def read_counters(text: str) -> dict[str, float]:
    """Read the counters that are compared, and the evictions. Raises `NotAServer` if they are not all there."""
    wanted = (*COUNTERS, EVICTIONS)
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # Sessions that came back from host memory replay nothing.
                if sample.name in wanted and sample.labels.get("kind") != "swapped":
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
    except ValueError as error:
        raise NotAServer(f"/metrics is not in Prometheus' text format: {error}") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise NotAServer(f"/metrics has no counter {missing[0]}: is this a split-server of another version?")
    return found


def compare(ledger: Ledger, before: Mapping[str, float], after: Mapping[str, float]) -> Agreement:
    """Compare what the counters grew by with the ledger."""
    if any(after[name] < before[name] for name in (*COUNTERS, EVICTIONS)):
        return unchecked("the server was restarted during the run: its counters began again from 0")
    bounds = ledger.bounds()
    grown = {name: after[name] - before[name] for name in COUNTERS}
    grown[POSITIONS] = grown[PROMPT] + grown[GENERATION]
    lines = tuple(Line(name, low, high, grown[name]) for name, (low, high) in bounds.items())
    return Agreement(lines, tuple(_notes(ledger, lines, after[EVICTIONS] - before[EVICTIONS])))


def unchecked(reason: str) -> Agreement:
    """Give the verdict of a check that was not possible."""
    return Agreement((), (f"not compared: {reason}",), checked=False)


def _notes(ledger: Ledger, lines: Iterable[Line], evicted: float) -> Iterable[str]:
    wrong = {line.counter: line for line in lines if not line.agrees}
    if ledger.broken_off:
        yield (
            f"{ledger.broken_off} requests were broken off: their last steps may or may not have been applied, and "
            "bytes are not compared"
        )
    if evicted:
        yield f"the server took the pages of {evicted:.0f} sessions back: what is replayed for them is counted again"
    if CONNECTIONS in wrong and wrong[CONNECTIONS].server > wrong[CONNECTIONS].low:
        yield "there were more connections than ours: another client used the server, or a link was lost and made anew"
    elif SESSIONS in wrong and wrong[SESSIONS].server > wrong[SESSIONS].high:
        yield "there were more sessions than ours: another client used the server"
