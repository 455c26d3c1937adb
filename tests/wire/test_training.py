"""Messages of split fine-tuning: whatever is cut up is put together again, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_llama.errors import BadRequest, BadStates
from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.frame import HEADER_SIZE, Frame, Kind, encode_message, split_message
from split_llama.wire.training import Assembler, Backward, Commit, Forward, Message, cut, flatten, unflatten

WIDTH = 8


def message(rows: int, seq: int = 1, codec: Codec = Codec.FP32, header: bytes = b'{"a":1}') -> Message:
    states = np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)
    return Message(Kind.FORWARD, seq, header, codec, rows, encode_rows(codec, states) if rows else b"")


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(Codec)), min_size=1, max_size=5),
    st.integers(1, 400),
    st.integers(0, 200),
)
def test_messages_come_out_as_they_went_in(sizes: list[tuple[int, Codec]], room: int, padding: int) -> None:
    limit = HEADER_SIZE + WIDTH * 4 + padding + room
    header = b'{"a":"' + b"x" * padding + b'"}'
    sent = [message(rows, seq, codec, header) for seq, (rows, codec) in enumerate(sizes)]
    frames = [frame for each in sent for frame in cut(each, 3, WIDTH, limit)]
    assert all(frame.size <= max(limit, HEADER_SIZE + len(header)) for frame in frames)
    assembler = Assembler(WIDTH, 40)
    # Over the wire and back: payloads become views of one message.
    arrived = [assembler.add(frame) for frame in split_message(encode_message(frames), 2**16)]
    assert [each for each in arrived if each is not None] == sent


def frames_of(rows: int, seq: int = 1) -> list[Frame]:
    return list(cut(message(rows, seq), 1, WIDTH, HEADER_SIZE + 7 + 2 * WIDTH * 4))


def test_a_frame_out_of_place_is_refused_and_the_next_message_is_taken() -> None:
    first, second, third = frames_of(6)
    for wrong in ([second], [first, third], [first, first], [first, frames_of(6, seq=2)[1]]):
        assembler = Assembler(WIDTH, 40)
        for frame in wrong[:-1]:
            assembler.add(frame)
        with pytest.raises((BadRequest, BadStates)):
            assembler.add(wrong[-1])
        # What is left of the refused message is refused too, and a new one is not.
        with pytest.raises(BadRequest):
            assembler.add(third)
        assert [assembler.add(frame) for frame in (first, second, third)][-1] == message(6)


def test_rows_are_not_copied_before_they_are_sent() -> None:
    whole = message(20)
    first, *others = cut(whole, 1, WIDTH, HEADER_SIZE + 7 + 2 * WIDTH * 4)
    assert len(first.payload) > 0
    rows = np.frombuffer(whole.rows, np.uint8)
    assert len(others) == 9
    assert all(np.shares_memory(rows, np.frombuffer(frame.payload, np.uint8)) for frame in others)


def test_what_is_gathered_is_counted() -> None:
    assembler, frames = Assembler(WIDTH, 40), frames_of(6)
    counted = []
    for frame in frames:
        assembler.add(frame)
        counted.append(assembler.nbytes)
    row = WIDTH * 4
    assert counted == [2 * row, 4 * row, 0]
    assembler.add(frames[0])
    assembler.reset()
    assert assembler.nbytes == 0


def test_more_rows_than_allowed_or_announced_are_refused() -> None:
    with pytest.raises(BadStates, match="may have 5 rows here, 6 were announced"):
        Assembler(WIDTH, 5).add(frames_of(6)[0])
    first, *_ = frames_of(2)
    first.ack = 1
    with pytest.raises(BadStates, match="from row 0 of 1"):
        Assembler(WIDTH, 5).add(first)


def test_a_header_that_is_longer_than_its_frame_is_refused() -> None:
    frame = frames_of(2)[0]
    frame.aux = len(frame.payload) + 1
    with pytest.raises(BadRequest, match="must come"):
        Assembler(WIDTH, 5).add(frame)


def test_an_unknown_codec_is_refused() -> None:
    frame = frames_of(2)[0]
    frame.codec = 9
    with pytest.raises(BadStates, match="unknown codec 9"):
        Assembler(WIDTH, 5).add(frame)


def test_headers_refuse_what_they_do_not_know() -> None:
    with pytest.raises(BadRequest, match="lengths"):
        Forward.from_bytes(b'{"generation":1,"step":1,"micro":0,"of":1,"targets":1,"lengths":[0]}')
    with pytest.raises(BadRequest, match="extra"):
        Backward.from_bytes(b'{"generation":1,"step":1,"micro":0,"extra":1}')
    with pytest.raises(BadRequest, match="loss"):
        Commit.from_bytes(b'{"generation":1,"step":1,"samples":1,"targets":1,"loss":NaN}')


def test_adapters_are_flattened_and_back() -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((5,), np.float32)}
    rows = flatten(values, WIDTH)
    assert rows.shape == (2, WIDTH)
    back = unflatten(rows, {name: value.shape for name, value in values.items()})
    assert all((back[name] == values[name]).all() for name in values)
    assert flatten({}, WIDTH).shape == (0, WIDTH)
    with pytest.raises(BadStates, match="rank or target modules"):
        unflatten(rows, {"a": (20, 3)})
