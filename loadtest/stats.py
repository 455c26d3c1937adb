"""Exact statistics over requests. Every sample is kept (8 bytes for each token generated), nothing is estimated.

A percentile is linear interpolation between the two nearest ranks, as numpy's default and Python's
`statistics.quantiles(method="inclusive")` (Hyndman and Fan 1996, definition 7).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from loadtest.records import Record

POINTS = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


def percentile(ordered: Sequence[float], point: float) -> float:
    """Give a percentile (`point` from 0 to 100) of samples in ascending order, at least one."""
    rank = (len(ordered) - 1) * point / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    return low + (high - low) * (rank - below)


def spread(samples: Iterable[float]) -> dict[str, float]:
    """Describe samples: count, mean, min, max and percentiles as p50, p90 ...; of none only the count."""
    ordered = sorted(samples)
    if not ordered:
        return {"count": 0}
    described: dict[str, float] = {"count": len(ordered), "mean": math.fsum(ordered) / len(ordered)}
    described |= {"min": ordered[0], "max": ordered[-1]}
    return described | {f"p{point:g}": percentile(ordered, point) for point in POINTS}


class Tally:
    """Adds up the measured requests of all processes, in whatever order they end.

    Latencies, tokens and bytes are those of answered requests; failed ones are only counted, by error class.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.round_trips = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._ttft = array("d")
        self._inter_token = array("d")
        self._total = array("d")
        self._session_rate = array("d")

    @property
    def ended(self) -> int:
        """Requests that ended, well or not."""
        return self.answered + sum(self.failures.values())

    def add(self, record: Record) -> None:
        """Count a request that ended."""
        if record.error is not None:
            self.failures[record.error] += 1
            self.examples.setdefault(record.error, record.message)
            return
        self.answered += 1
        self.prompt_tokens += record.prompt_tokens
        self.output_tokens += record.output_tokens
        self.round_trips += record.round_trips
        self._ttft.append(record.ttft_ms)
        self._inter_token.extend(record.itl_ms)
        self._total.append(record.total_ms)
        if record.total_ms > 0:
            self._session_rate.append(record.output_tokens * 1000 / record.total_ms)
        if record.footprint is not None:
            self.bytes_up += record.footprint.bytes_up
            self.bytes_down += record.footprint.bytes_down

    def summary(self, wall_s: float) -> dict[str, Any]:
        """Give everything as a JSON object; `wall_s` is how long measuring took."""
        positions = self.prompt_tokens + self.output_tokens - self.answered
        return {
            "wall_s": wall_s,
            "requests": {"ok": self.answered, "failed": self._failed()},
            "ttft_ms": spread(self._ttft),
            "inter_token_ms": spread(self._inter_token),
            "end_to_end_ms": spread(self._total),
            "output_tokens": self.output_tokens,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens_per_s": _ratio(self.output_tokens, wall_s),
            "prompt_tokens_per_s": _ratio(self.prompt_tokens, wall_s),
            "requests_per_s": _ratio(self.answered, wall_s),
            "session_tokens_per_s": spread(self._session_rate),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_up_per_position": _ratio(self.bytes_up, positions),
            "bytes_down_per_position": _ratio(self.bytes_down, positions),
            "bytes_up_per_output_token": _ratio(self.bytes_up, self.output_tokens),
            "bytes_down_per_output_token": _ratio(self.bytes_down, self.output_tokens),
            "round_trips": self.round_trips,
            "round_trips_per_output_token": _ratio(self.round_trips, self.output_tokens),
        }

    def _failed(self) -> dict[str, dict[str, Any]]:
        return {name: {"count": count, "example": self.examples[name]} for name, count in self.failures.most_common()}


def _ratio(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0
