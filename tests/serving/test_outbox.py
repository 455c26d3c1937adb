"""What waits for one edge process: long messages are cut as they are sent, and nobody waits for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.outbox import MAX_LETTERS, Outbox
from split_llama.errors import SlowReader
from split_llama.wire.frame import Frame, Kind, split_message

MIB = 2**20


def letter(seq: int, sizes: list[int], asked: list[tuple[int, int]] | None = None) -> Iterator[Frame]:
    """The frames of a message; `asked` hears of each when it is made."""
    for number, size in enumerate(sizes):
        if asked is not None:
            asked.append((seq, number))
        yield Frame(Kind.FORWARD, handle=99, seq=seq, first=number, payload=bytes(size))


def taken(outbox: Outbox, room: int) -> list[tuple[int, int, int]]:
    """Take one message: handle, seq and number of each frame."""
    return [(frame.handle, frame.seq, frame.first) for frame in split_message(outbox.take(room))]


def test_a_long_message_is_no_backlog_and_is_cut_as_there_is_room() -> None:
    outbox, asked = Outbox(1000), list[tuple[int, int]]()
    outbox.put_long(letter(1, [60_000] * 1200, asked), 7)
    assert outbox.size == 0
    assert asked == []
    assert taken(outbox, 130_000) == [(7, 1, 0), (7, 1, 1)]
    assert len(asked) == 3, "only what is about to be sent is there"
    frames = 2
    while message := outbox.take(130_000):
        assert len(message) <= 130_000
        frames += len(list(split_message(message)))
    assert frames == 1200
    assert outbox.is_empty


async def test_other_frames_overtake_and_those_of_the_handle_do_not() -> None:
    outbox = Outbox(1000)
    outbox.put_long(letter(1, [100] * 3), 7)
    assert taken(outbox, 140) == [(7, 1, 0)]
    outbox.put(Frame(Kind.ERROR, seq=2), 7)
    outbox.put_long(letter(3, [100]), 7)
    outbox.put(Frame(Kind.REPLY, seq=4), 8)
    outbox.put_long(letter(5, [100]), 9)
    assert taken(outbox, 1000) == [(8, 4, 0), (7, 1, 1), (7, 1, 2), (9, 5, 0), (7, 2, 0), (7, 3, 0)]
    assert outbox.size == 0
    assert outbox.is_empty
    outbox.put_long(letter(6, [100]), 7)
    outbox.finish()
    assert await outbox.wait(), "what was begun is still delivered"
    assert taken(outbox, 1000) == [(7, 6, 0)]
    assert not await outbox.wait()


def test_what_waits_for_a_handle_can_be_dropped() -> None:
    outbox = Outbox(1000)
    outbox.put_long(letter(1, [100] * 3), 7)
    outbox.put(Frame(Kind.ERROR, seq=2), 7)
    outbox.put_long(letter(3, [100]), 8)
    assert taken(outbox, 140) == [(7, 1, 0)]
    outbox.drop(7)
    outbox.drop(5)
    assert outbox.size == 0
    assert taken(outbox, 1000) == [(8, 3, 0)]


def test_a_backlog_still_ends_the_connection() -> None:
    outbox = Outbox(1000)
    outbox.put_long(letter(1, [10]), 7)
    for seq in range(40):
        outbox.put(Frame(Kind.ERROR, seq=seq), 7)
    with pytest.raises(SlowReader, match="1280 bytes"):
        outbox.take(MIB)
    outbox = Outbox(1000)
    for seq in range(MAX_LETTERS + 1):
        outbox.put_long(letter(seq, [10]), 7)
    with pytest.raises(SlowReader, match="messages wait unread"):
        outbox.take(MIB)


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.booleans(), st.lists(st.integers(0, 300), min_size=1, max_size=5)), max_size=20
    ),
    st.integers(32, 700),
)
def test_the_order_of_each_handle_stays(sent: list[tuple[int, bool, list[int]]], room: int) -> None:
    outbox, expected = Outbox(10**6), dict[int, list[tuple[int, int]]]()
    for seq, (handle, is_long, sizes) in enumerate(sent):
        sizes = sizes if is_long else sizes[:1]
        if is_long:
            outbox.put_long(letter(seq, sizes), handle)
        else:
            outbox.put(Frame(Kind.REPLY, handle=99, seq=seq, payload=bytes(sizes[0])), handle)
        expected.setdefault(handle, []).extend((seq, number) for number in range(len(sizes)))
    got: dict[int, list[tuple[int, int]]] = {}
    while message := outbox.take(room):
        frames = list(split_message(message))
        assert len(frames) == 1 or len(message) <= room
        for frame in frames:
            got.setdefault(frame.handle, []).append((frame.seq, frame.first))
    assert got == expected
    assert outbox.size == 0
    assert outbox.is_empty
