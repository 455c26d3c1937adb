from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest

from loadtest.agreement import (
    CONNECTIONS,
    COUNTERS,
    EVICTIONS,
    GENERATION,
    POSITIONS,
    PROMPT,
    RECEIVED,
    SENT,
    STEPS,
    Ledger,
    compare,
    read_counters,
)
from loadtest.records import Record
from split_llama.errors import NotAServer
from tests.loadtest.records_factory import records

NOTHING = dict.fromkeys((*COUNTERS, EVICTIONS), 0.0)


def ledger_of(drawn: list[Record]) -> Ledger:
    ledger = Ledger(2, hello_up=100, hello_down=300)
    for record in drawn:
        ledger.add(record)
    return ledger


def faithful(ledger: Ledger) -> dict[str, float]:
    """What a server that counts as we do would say, with every doubtful row in the prompt."""
    bounds = ledger.bounds()
    values = {name: low for name, (low, _) in bounds.items()}
    values[PROMPT] = values.pop(POSITIONS) - values[GENERATION]
    return NOTHING | values


def metrics_text(values: dict[str, float]) -> str:
    registry = CollectorRegistry()
    for name, value in values.items():
        Counter(name.removesuffix("_total"), "help", registry=registry).inc(value)
    return generate_latest(registry).decode()


@given(st.lists(records(), max_size=8), st.integers(0, 1000))
def test_a_faithful_server_agrees_wherever_its_counters_began(drawn: list[Record], start: int) -> None:
    ledger = ledger_of(drawn)
    before = {name: value + start for name, value in NOTHING.items()}
    after = {name: value + start for name, value in faithful(ledger).items()}
    agreement = compare(ledger, before, read_counters(metrics_text(after)))
    assert agreement.agrees
    broken_off = any(record.footprint is not None and not record.answered for record in drawn)
    assert {line.counter for line in agreement.lines} == {*COUNTERS, POSITIONS} - (
        {RECEIVED, SENT} if broken_off else set()
    )


@given(st.lists(records().filter(lambda record: record.answered), max_size=8), st.sampled_from(COUNTERS))
def test_a_counter_that_is_off_by_one_is_found(drawn: list[Record], doctored: str) -> None:
    ledger = ledger_of(drawn)
    after = faithful(ledger)
    after[doctored] += 1
    agreement = compare(ledger, NOTHING, read_counters(metrics_text(after)))
    assert not agreement.agrees
    wrong = {line.counter: line for line in agreement.lines if not line.agrees}
    together = {POSITIONS} if doctored in (PROMPT, GENERATION) else set()
    assert (wrong.keys() & {doctored}) | together == wrong.keys()
    assert all(line.server == line.high + 1 for line in wrong.values())


@given(st.lists(records().filter(lambda record: record.answered), max_size=8), st.integers(0, 40))
def test_a_prompts_lone_row_may_count_as_either(drawn: list[Record], moved: int) -> None:
    ledger = ledger_of(drawn)
    doubtful = sum(record.footprint.either_rows for record in drawn if record.footprint is not None)
    after = faithful(ledger)
    after[PROMPT] += 40 - moved
    after[GENERATION] += moved
    before = NOTHING | {PROMPT: 40.0}
    assert compare(ledger, before, after).agrees is (moved <= doubtful)


@given(st.lists(records(), min_size=1, max_size=8))
def test_steps_of_a_broken_request_may_count_or_not(drawn: list[Record]) -> None:
    ledger = ledger_of([dataclasses.replace(record, error="TimedOut") for record in drawn])
    low, high = ledger.bounds()[STEPS]
    opened = [record.footprint for record in drawn if record.footprint is not None]
    assert high - low == sum(footprint.open_rows for footprint in opened)
    for value, agrees in ((low, True), (high, True), (high + 1, False)):
        assert compare(ledger, NOTHING, faithful(ledger) | {STEPS: value}).agrees is agrees


def test_labels_are_added_up_and_other_metrics_ignored() -> None:
    text = metrics_text(NOTHING) + "# TYPE other gauge\nother 3\n"
    text = text.replace(f"{STEPS} 0.0", f'{STEPS}{{worker="0"}} 2\n{STEPS}{{worker="1"}} 3')
    assert read_counters(text)[STEPS] == 5


def test_other_clients_are_suspected() -> None:
    ledger = ledger_of([])
    agreement = compare(ledger, NOTHING, faithful(ledger) | {CONNECTIONS: 3.0})
    assert not agreement.agrees
    assert "another client" in agreement.notes[0]


def test_evictions_are_mentioned() -> None:
    ledger = ledger_of([])
    agreement = compare(ledger, NOTHING, faithful(ledger) | {EVICTIONS: 2.0})
    assert agreement.agrees
    assert "pages of 2 sessions" in agreement.notes[0]


def test_sessions_that_came_back_from_host_memory_replayed_nothing() -> None:
    kinds = f'{EVICTIONS}{{kind="swapped"}} 7.0\n{EVICTIONS}{{kind="dropped"}} 2.0\n'
    assert read_counters(metrics_text(dict.fromkeys(COUNTERS, 0.0)) + kinds)[EVICTIONS] == 2.0


def test_a_restarted_server_cannot_be_compared() -> None:
    ledger = ledger_of([])
    agreement = compare(ledger, NOTHING | {STEPS: 5.0}, faithful(ledger))
    assert not agreement.checked
    assert not agreement.agrees
    assert "restarted" in agreement.notes[0]


@pytest.mark.parametrize("text", ["", "<html>welcome</html>", 'fl_llama_steps_total{x="1" 2', "up 1\n"])
def test_what_is_no_servers_metrics_is_refused(text: str) -> None:
    with pytest.raises(NotAServer):
        read_counters(text)
