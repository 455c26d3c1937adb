"""When background work may run, and how long: properties of `Quanta`, whatever comes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.quanta import Quanta

QUANTUM = 0.020
seconds = st.floats(0.0001, 0.5)


def test_without_chats_it_runs_on_and_on() -> None:
    quanta = Quanta(QUANTUM, 0.5)
    now = 10.0
    for _ in range(5):
        assert quanta.wait_seconds(now, busy=False) == 0
        assert quanta.length(now) == QUANTUM
        quanta.ran(now, now + QUANTUM)
        now += QUANTUM


@given(st.floats(0.05, 1.0), st.lists(st.tuples(seconds, st.floats(0, 0.1)), min_size=5, max_size=40))
def test_beside_waiting_passes_it_gets_its_share_and_no_more(share: float, turns: list[tuple[float, float]]) -> None:
    quanta = Quanta(QUANTUM, share)
    began = now = 10.0
    worked = 0.0
    for length, late in turns:
        now += quanta.wait_seconds(now, busy=True) + late
        quanta.ran(now, now + length)
        now += length
        worked += length
    # The last quantum's rest is still to come.
    now += quanta.wait_seconds(now, busy=True)
    assert worked / (now - began) <= share + 1e-9


@given(st.lists(st.floats(0.001, 0.4), min_size=1, max_size=30))
def test_beside_a_chat_a_quantum_is_no_longer_than_a_token(tokens: list[float]) -> None:
    quanta = Quanta(QUANTUM, 0.5)
    now = 10.0
    for alone in tokens:
        now += alone
        quanta.decoded(now, alone)
    assert quanta.length(now) <= min(QUANTUM, max(tokens)) + 1e-9
    assert quanta.length(now) >= min(QUANTUM, min(tokens)) - 1e-9


def test_a_chat_leaves_room_between_quanta_until_it_ends() -> None:
    quanta = Quanta(QUANTUM, 0.5)
    quanta.decoded(10.0, 0.004)
    quanta.ran(10.0, 10.004)
    assert abs(quanta.wait_seconds(10.004, busy=False) - 0.004) < 1e-9
    # No token for a while: the chat is over, or its user reads.
    assert quanta.wait_seconds(10.2, busy=False) == 0
    assert quanta.length(10.2) == QUANTUM


def test_a_new_chat_is_not_measured_by_an_old_one() -> None:
    quanta = Quanta(QUANTUM, 0.5)
    quanta.decoded(10.0, 0.019)
    quanta.decoded(20.0, 0.003)
    assert quanta.length(20.0) == 0.003
