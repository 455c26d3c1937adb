"""The chat protocol's messages, as `docs/chat.md` describes them: JSON objects, one per WebSocket text message."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from split_llama.errors import BadRequest, ContextExceeded, FlLlamaError

# What a browser asks for beside its key; the answer names it, never the key.
SUBPROTOCOL = "fl-llama"
KEY_PREFIX = "key."
# Characters. A context of 200,000 tokens is about as long, and the event loop reads this in milliseconds.
MAX_MESSAGE = 2**20
FRONT = re.compile(r'\s*\{\s*"type"\s*:\s*"[a-z]*"\s*,\s*"id"\s*:\s*"([^"\\]{1,64})"')

Identifier = Annotated[str, Field(min_length=1, max_length=64)]
FinishReason = Literal["stop", "length", "cancelled"]


class FromClient(BaseModel):
    """What a client sends. Unknown fields are refused by name: a misspelt setting must not be lost in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(FromClient):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Send(FromClient):
    """Ask for the next answer of a conversation; what is left out takes the defaults that `hello` named."""

    type: Literal["send"]
    id: Identifier
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class Cancel(FromClient):
    """Stop an answer; one that has ended already is none to complain about."""

    type: Literal["cancel"]
    id: Identifier


class FromServer(BaseModel):
    """What a client gets. Later versions may add fields: ignore those you do not know."""

    model_config = ConfigDict(frozen=True)


class Noise(FromServer):
    """The noise in force: `sigma` per value, rows clipped to norm `clip`; `setting` is what the user wrote."""

    sigma: float
    clip: float | None
    setting: str


class Defaults(FromServer):
    """What an answer is made with where `send` says nothing."""

    temperature: float
    top_p: float
    max_tokens: int


class Hello(FromServer):
    """First message of every connection: what answers here, and what of it runs where."""

    type: Literal["hello"] = "hello"
    model: str
    max_model_len: int
    partition: tuple[int, int]
    blocks: int
    hidden_size: int
    codec: str
    noise: Noise
    server: str
    defaults: Defaults


class Delta(FromServer):
    """The next piece of an answer: `tokens` new tokens, and the text that became readable with them."""

    type: Literal["delta"] = "delta"
    id: str
    text: str
    tokens: int


class Usage(FromServer):
    """What an answer took so far; every figure counts from its beginning."""

    type: Literal["usage"] = "usage"
    id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    round_trips: int
    bytes_up: int
    bytes_down: int
    rows_up: int
    drafted: int
    accepted: int
    tokens_per_second: float
    ttft_ms: float


class Done(FromServer):
    """Last message of an answer that began."""

    type: Literal["done"] = "done"
    id: str
    finish_reason: FinishReason


class Error(FromServer):
    """An answer that failed (with its `id`), or a message that was none. The connection lives on."""

    type: Literal["error"] = "error"
    id: str | None
    code: str
    message: str
    retry_after_ms: int


Request = Send | Cancel
Reply = Hello | Delta | Usage | Done | Error
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="type")])


def read_json(text: str) -> object:
    """Read a client's message. Raises `BadRequest` for one that is no JSON object, `ContextExceeded` where too long."""
    if len(text) > MAX_MESSAGE:
        raise ContextExceeded(
            f"the message has {len(text):,} characters, at most {MAX_MESSAGE:,} are possible; nothing was sent to the "
            "server. Shorten the conversation"
        )
    try:
        raw = from_json(text)
    except ValueError as error:
        raise BadRequest(f"Invalid JSON: {error}. docs/chat.md describes every message") from error
    if not isinstance(raw, dict):
        raise BadRequest("expected an object, other JSON came. docs/chat.md describes every message")
    return raw


def parse_request(raw: object) -> Request:
    """Check what was read. Raises `BadRequest` that names what is wrong in it."""
    try:
        return _REQUEST.validate_python(raw)
    except ValidationError as error:
        raise BadRequest(_explain(error)) from error


def id_of(text: str, raw: object) -> str | None:
    """Find the id in a message that cannot be used, so that its sender learns which one it was.

    `raw` is what was read of it; in one that was not read it is found where it stands in front.
    """
    front = FRONT.match(text)
    found = raw.get("id") if isinstance(raw, dict) else front and front[1]
    return found if isinstance(found, str) and 0 < len(found) <= 64 and found.isprintable() else None


def error_message(error: FlLlamaError, identifier: str | None) -> Error:
    """Put one of our exceptions into words for a client."""
    name = type(error).__name__
    return Error(
        id=identifier,
        code=re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(),
        message=error.message,
        retry_after_ms=error.retry_after_ms,
    )


def key_of(offered: Iterable[str]) -> str | None:
    """Find the API key among the subprotocols a client offers: `key.` and base64url of it, without padding.

    A browser cannot set the Authorization header of a WebSocket; this header it can. A key that cannot be decoded is
    as good as none.
    """
    for protocol in offered:
        if protocol.startswith(KEY_PREFIX):
            packed = protocol.removeprefix(KEY_PREFIX)
            try:
                return base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True).decode()
            except (binascii.Error, UnicodeDecodeError, ValueError):
                return None
    return None


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False, include_context=False)[:3]:
        # The union's tag comes first in every place.
        place = ".".join(str(part) for part in fault["loc"] if part not in ("send", "cancel"))
        faults.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    return f"the message cannot be read: {'; '.join(faults)}. docs/chat.md describes every message"
