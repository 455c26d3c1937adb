"""What is sent first when the line is slow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_client.outbox import Outbox
from split_llama.wire.frame import HEADER_SIZE, Frame, Kind


def step(count: int, seq: int = 0) -> Frame:
    return Frame(Kind.STEP, handle=1, seq=seq, count=count, payload=bytes(10 * count))


def counts(frames: list[Frame]) -> list[int]:
    return [frame.count for frame in frames]


def test_a_token_passes_a_prompt_that_waits_and_prompts_take_turns() -> None:
    outbox: Outbox[str] = Outbox(2 * (HEADER_SIZE + 1000))
    outbox.put("long", [step(100, seq) for seq in range(4)])
    outbox.put("other", [step(99, seq) for seq in range(4)])
    assert counts(outbox.take()) == [99, 100]
    outbox.put("token", [step(1)])
    assert counts(outbox.take()) == [1, 99]
    assert counts(outbox.take()) == [99, 100]
    assert counts(outbox.take()) == [99, 100]
    assert counts(outbox.take()) == [100]
    assert not outbox
    assert outbox.take() == []


def test_a_frame_over_the_limit_goes_alone() -> None:
    outbox: Outbox[str] = Outbox(100)
    outbox.put("a", [step(1), step(50), step(1)])
    assert [counts(outbox.take()) for _ in range(3)] == [[1], [50], [1]]


def test_a_fork_goes_before_the_close_of_its_parent() -> None:
    outbox: Outbox[str] = Outbox(10**6)
    outbox.put("child", [Frame(Kind.FORK, handle=2), step(100), step(1)])
    outbox.put("parent", [Frame(Kind.CLOSE, handle=1)])
    assert [frame.kind for frame in outbox.take()] == [Kind.FORK, Kind.CLOSE, Kind.STEP, Kind.STEP]


def test_steps_of_a_session_that_was_closed_stay_here() -> None:
    outbox: Outbox[str] = Outbox(10**6)
    outbox.put("a", [Frame(Kind.OPEN, handle=1), step(5), step(6)])
    outbox.put("b", [step(7)])
    outbox.put("a", [Frame(Kind.CLOSE, handle=1)])
    kinds = [(frame.kind, frame.count) for frame in outbox.take()]
    assert kinds == [(Kind.OPEN, 0), (Kind.STEP, 7), (Kind.CLOSE, 0)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.booleans()), max_size=60))
def test_nothing_is_lost_and_every_sessions_order_stays(events: list[tuple[str, int, bool]]) -> None:
    outbox: Outbox[str] = Outbox(400)
    sent: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    came: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    handles = {"a": 1, "b": 2, "c": 3}
    names = {number: name for name, number in handles.items()}

    def collect() -> None:
        frames = outbox.take()
        assert len(frames) == 1 or sum(frame.size for frame in frames) <= 400
        for frame in frames:
            came[names[frame.handle]].append(frame.seq)

    for number, (name, count, collects) in enumerate(events):
        frame = Frame(Kind.STEP, handle=handles[name], seq=number, count=count, payload=bytes(10 * count))
        outbox.put(name, [frame])
        sent[name].append(number)
        if collects:
            collect()
    while outbox:
        collect()
    assert came == sent
