from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from split_llama.errors import BadRequest, FlLlamaError, OutOfPages, RemoteError, all_errors
from split_llama.wire.control import (
    ErrorPayload,
    Fork,
    Grant,
    Hello,
    HelloReply,
    Moved,
    Open,
    error_frame,
    error_from_frame,
)
from split_llama.wire.frame import MAX_FRAME_BYTES, Frame, Kind

SESSION, SECRET, DIGEST = "5e" * 16, "ab" * 32, "cd" * 32
OPEN = Open(session=SESSION, secret=SECRET, blocks=(1, 5), geometry=DIGEST, adapter="tone", hops=("https://b:8700",))
HELLO_REPLY = HelloReply(
    protocol=1,
    server="fl-llama 0.1.0",
    model="demo",
    blocks=(1, 5),
    hidden_size=64,
    geometry=DIGEST,
    codecs=("fp32", "int8"),
    max_frame_bytes=65536,
    max_message_bytes=1 << 20,
    max_step_rows=512,
    max_model_len=2048,
)
PAYLOADS = [
    Hello(protocol=1, client="edge 0.1.0"),
    HELLO_REPLY,
    OPEN,
    Open(session=SESSION, secret=SECRET, blocks=(0, 1)),
    Grant(window_steps=8, window_bytes=1 << 20, length=7, seq=3, grace_seconds=120),
    Fork(parent=1, at=7, session=SESSION, secret=SECRET),
    ErrorPayload(code=62, error="OutOfPages", message="no pages", retry_after_ms=50),
    Moved(address="https://other:8700"),
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: type(payload).__name__)
def test_payloads_come_back_as_they_went(payload: Hello) -> None:
    assert type(payload).from_bytes(memoryview(payload.to_bytes())) == payload
    assert b"null" not in payload.to_bytes()


@pytest.mark.parametrize("model", [Hello, HelloReply, Open, Grant, Fork, ErrorPayload, Moved])
@given(payload=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_payload_parses_or_is_refused(model: type[Hello], payload: bytes) -> None:
    with pytest.raises(BadRequest, match=model.__name__):
        model.from_bytes(payload)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"session": "5e"}, "session"),
        ({"secret": "AB" * 32}, "secret"),
        ({"blocks": [3, 3]}, "start < stop"),
        ({"blocks": [3]}, "blocks"),
        ({"blocks": ["1", "5"]}, "blocks"),
        ({"adapter": ""}, "adapter"),
        ({"hops": ["x"] * 17}, "hops"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_a_wrong_or_unknown_field_of_a_client_is_named(change: dict[str, object], field: str) -> None:
    raw = json.loads(OPEN.to_bytes()) | change
    with pytest.raises(BadRequest, match=field):
        Open.from_bytes(json.dumps(raw).encode())


def test_an_error_about_a_payload_never_repeats_the_secret() -> None:
    raw = json.loads(OPEN.to_bytes()) | {"secret": "S3CRET" * 10, "blocks": [5, 1]}
    with pytest.raises(BadRequest) as caught:
        Open.from_bytes(json.dumps(raw).encode())
    assert "S3CRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert SECRET not in repr(OPEN)


def test_a_newer_server_may_add_fields() -> None:
    raw = json.loads(HELLO_REPLY.to_bytes()) | {"motto": "new"}
    assert HelloReply.from_bytes(json.dumps(raw).encode()) == HELLO_REPLY


def test_payloads_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OPEN.adapter = "other"


@pytest.mark.parametrize("cls", list(all_errors()), ids=lambda cls: cls.__name__)
def test_every_error_crosses_the_wire(cls: type[FlLlamaError]) -> None:
    frame = Frame.decode(error_frame(7, 9, cls("what came, what to do", retry_after_ms=250)).encode())
    assert (frame.kind, frame.handle, frame.seq, frame.aux) == (Kind.ERROR, 7, 9, cls.code)
    error = error_from_frame(frame)
    assert type(error) is cls
    assert (error.message, error.retry_after_ms) == ("what came, what to do", 250)


def test_a_long_message_still_fits_a_frame() -> None:
    assert error_frame(1, 1, OutOfPages("é" * 10**6)).size < MAX_FRAME_BYTES


@given(payload=st.binary(max_size=40))
def test_a_garbled_error_is_still_an_error(payload: bytes) -> None:
    error = error_from_frame(Frame(Kind.ERROR, aux=62, payload=payload))
    assert type(error) is RemoteError
    assert "62" in error.message
