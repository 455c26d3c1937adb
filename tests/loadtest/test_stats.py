from __future__ import annotations

import itertools
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.records import Record, decode_line, encode_line
from loadtest.stats import POINTS, Tally, percentile, spread
from tests.loadtest.records_factory import milliseconds, records


@given(st.lists(milliseconds, min_size=1, max_size=60), st.floats(0, 100))
def test_percentile_is_numpys(samples: list[float], point: float) -> None:
    assert percentile(sorted(samples), point) == pytest.approx(np.percentile(samples, point), rel=1e-9, abs=1e-9)


@given(st.lists(milliseconds, min_size=2, max_size=60))
def test_percentile_is_that_of_statistics(samples: list[float]) -> None:
    expected = statistics.quantiles(samples, n=100, method="inclusive")
    found = [percentile(sorted(samples), point) for point in range(1, 100)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.lists(milliseconds, min_size=1, max_size=60))
def test_spread_is_in_order_and_within_its_samples(samples: list[float]) -> None:
    described = spread(samples)
    points = [described["min"], *(described[f"p{point:g}"] for point in POINTS), described["max"]]
    assert all(low <= high or low == pytest.approx(high) for low, high in itertools.pairwise(points))
    assert described["count"] == len(samples)
    assert described["mean"] == pytest.approx(statistics.fmean(samples))


def test_no_samples_have_only_a_count() -> None:
    assert spread([]) == {"count": 0}


@given(st.lists(records(), max_size=12), st.integers(0, 2**32))
def test_the_order_in_which_processes_report_does_not_matter(drawn: list[Record], seed: int) -> None:
    shuffled = random.Random(seed).sample(drawn, len(drawn))
    first, second = Tally(), Tally()
    for record in drawn:
        first.add(record)
    for record in shuffled:
        second.add(record)
    assert first.ended == len(drawn)
    left, right = first.summary(2.0), second.summary(2.0)
    left["requests"]["failed"] = dict(sorted(left["requests"]["failed"].items()))
    right["requests"]["failed"] = dict(sorted(right["requests"]["failed"].items()))
    assert left == right


@given(st.lists(records(), max_size=12))
def test_a_tally_adds_up_what_was_answered(drawn: list[Record]) -> None:
    tally = Tally()
    for record in drawn:
        tally.add(record)
    result = tally.summary(4.0)
    answered = [record for record in drawn if record.answered]
    assert result["requests"]["ok"] == len(answered)
    assert sum(kind["count"] for kind in result["requests"]["failed"].values()) == len(drawn) - len(answered)
    assert result["output_tokens"] == sum(record.output_tokens for record in answered)
    assert result["output_tokens_per_s"] == result["output_tokens"] / 4
    assert result["inter_token_ms"]["count"] == result["output_tokens"] - len(answered)


def test_a_run_without_time_has_no_rates() -> None:
    assert Tally().summary(0.0)["output_tokens_per_s"] == 0


@given(records())
def test_records_travel_as_lines(record: Record) -> None:
    line = encode_line("ended", record=record.to_json())
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert Record.from_json(decode_line(line)["record"]) == record


@pytest.mark.parametrize("line", [b"", b"nonsense\n", b"[1]\n", b'{"event": 3}\n'])
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_line(line)
