"""JSON payloads of the control frames: strict to what a client sends, lenient to what a newer server adds."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from split_llama.errors import BadRequest, FlLlamaError, RemoteError, error_for_code
from split_llama.wire.frame import Frame, Kind

MAX_MESSAGE_CHARS = 4000

SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Secret = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Address = Annotated[str, Field(min_length=1, max_length=2048)]
U32 = Annotated[int, Field(ge=0, lt=2**32)]
Handle = Annotated[int, Field(ge=1, lt=2**32)]
Blocks = tuple[Annotated[int, Field(ge=0, lt=2**16)], Annotated[int, Field(ge=0, lt=2**16)]]


class Payload(BaseModel):
    """A JSON payload as the server sends it: unknown fields are a newer version's, and left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)

    def to_bytes(self) -> bytes:
        """Give the payload as UTF-8 JSON; fields that are null are left out."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def from_bytes(cls, payload: bytes | bytearray | memoryview) -> Self:
        """Read the payload. Raises `BadRequest` that names each wrong field, never its value: it may be a secret."""
        try:
            return cls.model_validate_json(bytes(payload))
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False, include_context=False)
            listed = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'payload'}: {fault['msg']}" for fault in faults[:5]
            )
            raise BadRequest(f"not a valid {cls.__name__} payload: {listed}") from None


class Request(Payload):
    """A JSON payload as a client sends it: an unknown field is refused."""

    model_config = ConfigDict(extra="forbid")


class Hello(Request):
    """The client's first frame. `model` asks for one of several served models; null takes the server's own."""

    protocol: U32
    client: Name
    model: Name | None = None


class HelloReply(Payload):
    """What the server hosts and allows. `blocks` is `[start, stop)`; limits are bytes and rows per frame or message."""

    protocol: U32
    server: Name
    model: Name
    blocks: Blocks
    hidden_size: Annotated[int, Field(ge=1, lt=2**24)]
    geometry: Digest
    codecs: tuple[Name, ...]
    max_frame_bytes: U32
    max_message_bytes: U32
    max_step_rows: Annotated[int, Field(ge=1, lt=2**32)]
    max_model_len: Annotated[int, Field(ge=1, lt=2**32)]


class Open(Request):
    """Open a session, or ATTACH to one: ATTACH carries the same so that an unknown session can be made anew.

    `session` and `secret` are drawn by the client and travel in OPEN and ATTACH (and FORK, for the child) only.
    A null digest is not checked. `hops` lists the servers of a chain that come after this one.
    """

    session: SessionId
    secret: Secret
    blocks: Blocks
    geometry: Digest | None = None
    weights: Digest | None = None
    tokenizer: Digest | None = None
    adapter: Name | None = None
    hops: Annotated[tuple[Address, ...], Field(max_length=16)] = ()

    @model_validator(mode="after")
    def _blocks_in_order(self) -> Self:
        if self.blocks[0] >= self.blocks[1]:
            raise ValueError(f"blocks must be [start, stop) with start < stop, {list(self.blocks)} came")
        return self


class Grant(Payload):
    """The answer to OPEN, ATTACH and FORK.

    `window_steps` and `window_bytes` bound what may be unanswered; `length` is the session's positions and `seq` its
    last applied step; `grace_seconds` is how long it outlives its connection.
    """

    window_steps: Annotated[int, Field(ge=1, lt=2**32)]
    window_bytes: Annotated[int, Field(ge=1, lt=2**32)]
    length: U32
    seq: U32
    grace_seconds: Annotated[float, Field(ge=0, strict=False)]


class Fork(Request):
    """Fork the session of handle `parent` at position `at` into a new one, under the frame's own handle."""

    parent: Handle
    at: U32
    session: SessionId
    secret: Secret


class ErrorPayload(Payload):
    """A refusal: `code` and `error` (the class name) of `split_llama.errors`; `retry_after_ms` 0 means do not retry."""

    code: Annotated[int, Field(ge=0, lt=2**16)]
    error: str
    message: str
    retry_after_ms: U32 = 0


class Moved(Payload):
    """The session lives at `address` now: connect there and ATTACH."""

    address: Address


def error_frame(handle: int, seq: int, error: FlLlamaError) -> Frame:
    """Build the ERROR frame for a refusal of one step or session; `handle` 0 is about the connection."""
    payload = ErrorPayload(
        code=error.code,
        error=type(error).__name__,
        message=error.message[:MAX_MESSAGE_CHARS],
        retry_after_ms=error.retry_after_ms,
    )
    return Frame(Kind.ERROR, aux=error.code, handle=handle, seq=seq, payload=payload.to_bytes())


def error_from_frame(frame: Frame) -> FlLlamaError:
    """Rebuild the exception an ERROR frame carries: returned, not raised; a garbled one becomes a `RemoteError`."""
    try:
        payload = ErrorPayload.from_bytes(frame.payload)
    except BadRequest as error:
        return RemoteError(f"the other side sent an unreadable error (code {frame.aux}): {error.message}")
    return error_for_code(payload.code, payload.message, payload.retry_after_ms)
