from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_llama.errors import BadFrame, ConnectionRefused, FrameTooLarge, UnsupportedVersion
from split_llama.wire.frame import (
    HEADER_SIZE,
    MAX_FRAME_BYTES,
    Frame,
    Kind,
    encode_message,
    frame_limit,
    split_message,
)

U8 = st.integers(0, 2**8 - 1)
U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
FRAMES = st.builds(Frame, st.sampled_from(Kind), U8, U8, U16, U32, U32, U32, U32, U32, st.binary(max_size=200))


@given(frame=FRAMES)
def test_any_frame_comes_back_as_it_went(frame: Frame) -> None:
    assert Frame.decode(frame.encode()) == frame
    assert len(frame.encode()) == frame.size == HEADER_SIZE + len(frame.payload)


@given(frames=st.lists(FRAMES, max_size=5))
def test_frames_of_a_message_keep_their_order(frames: list[Frame]) -> None:
    assert list(split_message(encode_message(frames))) == frames


@given(message=st.binary(max_size=300))
def test_any_bytes_give_frames_or_a_fatal_error(message: bytes) -> None:
    try:
        frames = list(split_message(message))
    except ConnectionRefused:
        return
    assert encode_message(frames) == message


@given(frames=st.lists(FRAMES, min_size=1, max_size=3), at=st.integers(0), byte=U8, cut=st.integers(0))
def test_a_damaged_message_gives_frames_or_a_fatal_error(frames: list[Frame], at: int, byte: int, cut: int) -> None:
    message = bytearray(encode_message(frames))
    message[at % len(message)] = byte
    del message[cut % len(message) + 1 :]
    try:
        again = list(split_message(message))
    except ConnectionRefused:
        return
    assert encode_message(again) == message


def test_the_payload_is_a_view_of_the_message() -> None:
    message = bytearray(Frame(Kind.STEP, payload=b"abc").encode())
    frame = Frame.decode(message)
    message[HEADER_SIZE] = ord("x")
    assert bytes(frame.payload) == b"xbc"


def test_an_empty_message_holds_no_frame() -> None:
    assert list(split_message(b"")) == []


@pytest.mark.parametrize("size", [1, HEADER_SIZE - 1, HEADER_SIZE + 2])
def test_a_truncated_frame_is_refused_with_both_sizes(size: int) -> None:
    with pytest.raises(BadFrame, match=str(size)):
        list(split_message(Frame(Kind.STEP, payload=b"abc").encode()[:size]))


def test_decode_takes_exactly_one_frame() -> None:
    encoded = Frame(Kind.HELLO).encode()
    with pytest.raises(BadFrame, match="64 bytes came"):
        Frame.decode(encoded + encoded)
    with pytest.raises(BadFrame, match="0 bytes came"):
        Frame.decode(b"")


def test_foreign_bytes_another_version_and_an_unknown_kind_are_refused() -> None:
    encoded = bytearray(Frame(Kind.HELLO).encode())
    with pytest.raises(BadFrame, match="magic"):
        Frame.decode(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n")
    with pytest.raises(UnsupportedVersion, match="version 9"):
        Frame.decode(encoded[:2] + b"\x09" + encoded[3:])
    with pytest.raises(BadFrame, match="200 is no kind"):
        Frame.decode(encoded[:3] + b"\xc8" + encoded[4:])


def test_the_limit_counts_the_header_and_is_checked_before_the_payload() -> None:
    assert Frame.decode(Frame(Kind.STEP, payload=bytes(MAX_FRAME_BYTES - HEADER_SIZE)).encode()).size == MAX_FRAME_BYTES
    too_large = Frame(Kind.STEP, payload=bytes(MAX_FRAME_BYTES - HEADER_SIZE + 1)).encode()
    with pytest.raises(FrameTooLarge, match="65537 were announced"):
        Frame.decode(too_large[:HEADER_SIZE])
    assert Frame.decode(too_large, MAX_FRAME_BYTES + 1).size == MAX_FRAME_BYTES + 1


def test_a_row_wider_than_the_limit_raises_the_limit() -> None:
    assert frame_limit(4096) == MAX_FRAME_BYTES
    assert frame_limit(16384) >= HEADER_SIZE + 4 * 16384


def test_a_field_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadFrame, match="STEP"):
        Frame(Kind.STEP, seq=2**32).encode()
