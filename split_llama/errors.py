"""Every error this project raises at a user, a file or the wire.

    FlLlamaError
    ├── UsageError                  a flag, a setting or a prompt is wrong          exit 2
    │   ├── ContextExceeded         prompt or answer longer than the context
    │   └── CacheError              the local cache cannot be read or written
    ├── ModelError                  the model is unusable                           exit 4
    │   ├── UnsupportedModel        the maths of this checkpoint is not supported
    │   ├── CheckpointError         missing, truncated or foreign files
    │   ├── ModelMismatch           the two parties do not hold the same model
    │   ├── PinMismatch             the server's weights changed since first use
    │   └── AdapterMismatch         LoRA weights of another model, rank or kind
    ├── RemoteError                 the other party refused or cannot be reached    exit 3
    │   ├── ServerUnreachable       no server there
    │   ├── NotAServer              something answers, but it is no split-server
    │   ├── ServerFault             the server failed while it worked
    │   └── DeadlineExceeded        no complete answer in the time the caller gave
    ├── ConnectionRefused           fatal: the connection is closed
    │   ├── BadFrame                framing that cannot be trusted any more
    │   ├── UnsupportedVersion      another version of the protocol
    │   ├── FrameTooLarge           a frame or message over the limit
    │   ├── Unauthenticated         no API key, or an unknown one
    │   └── SlowReader              the peer does not read its replies
    └── RequestRefused              one step or session is refused, the connection lives
        ├── BadRequest              malformed control payload, flags or tree
        ├── BadStates               wrong shape or codec
        ├── NonFiniteStates         NaN or infinity in the states
        ├── PositionGap             `first` beyond the session's length
        ├── SequenceGap             a step number was skipped
        ├── StaleStep               an older step whose reply was already acknowledged
        ├── WindowExceeded          more steps or bytes in flight than granted
        ├── UnknownSession          no such handle or session
        ├── NotOwner                another owner's session
        ├── PartitionNotAllowed     blocks this server does not host
        ├── LimitExceeded           too many sessions or tokens for this key
        ├── OutOfPages              no KV pages left now
        ├── Draining                the server is shutting down
        ├── UnknownJob              no fine-tuning job of this id
        ├── JobEnded                the job is done, was cancelled, or has no place left
        └── UnknownStep             a gradient for a micro-batch that was never sent

One class is one wire code and one HTTP status, and a fatal one has one WebSocket close code (RFC 6455, section 7.4.2:
4000-4999 are for applications). `error_for_code` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class FlLlamaError(Exception):
    """Root of the tree. The message says what was expected, what came, and what to do.

    `retry_after_ms` is set where trying again can help; it travels in ERROR frames and as HTTP `Retry-After`.
    """

    code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    close_code: ClassVar[int | None] = None
    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms

    @property
    def message(self) -> str:
        """The text without the class name."""
        return str(self.args[0])


class UsageError(FlLlamaError):
    """A flag, a setting or a prompt is wrong."""

    code, status, exit_code = 10, 400, 2


class ContextExceeded(UsageError):
    """Prompt or answer longer than the context; the message gives both lengths."""

    code, status = 11, 413


class CacheError(UsageError):
    """The local cache cannot be read or written (a full disk, permissions)."""

    code, status = 12, 507


class ModelError(FlLlamaError):
    """The model is unusable."""

    code, status, exit_code = 20, 422, 4


class UnsupportedModel(ModelError):
    """The checkpoint asks for maths that is not supported; the message names the field."""

    code, status = 21, 422


class CheckpointError(ModelError):
    """Missing, truncated or foreign checkpoint files."""

    code, status = 22, 422


class ModelMismatch(ModelError):
    """The two parties do not hold the same model: geometry, weights or tokenizer differ."""

    code, status = 23, 409


class PinMismatch(ModelError):
    """The weights the server offers are not those pinned on first use."""

    code, status = 24, 409


class AdapterMismatch(ModelError):
    """LoRA weights that do not fit: of another model, rank or kind, or unreadable."""

    code, status = 25, 409


class RemoteError(FlLlamaError):
    """The other party refused or cannot be reached."""

    code, status = 30, 502


class ServerUnreachable(RemoteError):
    """Nothing answers at the address."""

    code, status = 31, 503


class NotAServer(RemoteError):
    """Something answers at the address, but it is no split-server."""

    code, status = 32, 502


class ServerFault(RemoteError):
    """The server failed while it worked on a step; its log says more."""

    code, status = 33, 500


class DeadlineExceeded(RemoteError):
    """The answer was not complete in the time its caller gave it."""

    code, status = 34, 504


class ConnectionRefused(FlLlamaError):
    """Fatal: broken framing or identity closes the connection."""

    code, status, close_code = 40, 400, 4400


class BadFrame(ConnectionRefused):
    """Bytes that are not a frame of this protocol."""

    code, status, close_code = 41, 400, 4401


class UnsupportedVersion(ConnectionRefused):
    """A frame of another protocol version."""

    code, status, close_code = 42, 426, 4402


class FrameTooLarge(ConnectionRefused):
    """A frame or message over the announced limit."""

    code, status, close_code = 43, 413, 1009


class Unauthenticated(ConnectionRefused):
    """No API key, or an unknown one."""

    code, status, close_code = 44, 401, 4404


class SlowReader(ConnectionRefused):
    """The peer does not read its replies; its sessions stay resumable."""

    code, status, close_code = 45, 408, 4405


class RequestRefused(FlLlamaError):
    """One step or session is refused; the connection and all else live on."""

    code, status = 50, 400


class BadRequest(RequestRefused):
    """A malformed control payload, flag, tree or accept list."""

    code, status = 51, 400


class BadStates(RequestRefused):
    """States of the wrong shape or codec."""

    code, status = 52, 400


class NonFiniteStates(RequestRefused):
    """NaN or infinity in the states."""

    code, status = 53, 422


class PositionGap(RequestRefused):
    """`first` lies beyond the session's length."""

    code, status = 54, 409


class SequenceGap(RequestRefused):
    """A step number was skipped."""

    code, status = 55, 409


class StaleStep(RequestRefused):
    """An older step whose reply was already acknowledged and dropped."""

    code, status = 56, 409


class WindowExceeded(RequestRefused):
    """More steps or bytes in flight than the session was granted."""

    code, status = 57, 429


class UnknownSession(RequestRefused):
    """No session under this handle or id."""

    code, status = 58, 404


class NotOwner(RequestRefused):
    """The session belongs to another owner, or its secret is wrong."""

    code, status = 59, 403


class PartitionNotAllowed(RequestRefused):
    """The blocks asked for are not all hosted here."""

    code, status = 60, 403


class LimitExceeded(RequestRefused):
    """The API key's limit on sessions or rate is reached."""

    code, status = 61, 429


class OutOfPages(RequestRefused):
    """No KV pages are left at the moment."""

    code, status = 62, 503


class Draining(RequestRefused):
    """The server is shutting down and takes nothing new."""

    code, status = 63, 503


class UnknownJob(RequestRefused):
    """No fine-tuning job of this id is held here."""

    code, status = 64, 404


class JobEnded(RequestRefused):
    """The job is done, was cancelled, or has no place left."""

    code, status = 65, 409


class UnknownStep(RequestRefused):
    """A gradient for a micro-batch whose states were never sent, or not to the end."""

    code, status = 66, 409


def all_errors(root: type[FlLlamaError] = FlLlamaError) -> Iterator[type[FlLlamaError]]:
    """Yield `root` and every class of the tree below it; what other modules derive from one stays theirs."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == __name__:
            yield from all_errors(child)


def error_for_code(code: int, message: str, retry_after_ms: int = 0) -> FlLlamaError:
    """Rebuild the error behind a wire code; an unknown code becomes a `RemoteError` that names it."""
    for cls in all_errors():
        if cls.code == code:
            return cls(message, retry_after_ms=retry_after_ms)
    return RemoteError(f"{message} (error code {code}, unknown to this version)", retry_after_ms=retry_after_ms)


def error_for_close(close_code: int, message: str) -> FlLlamaError:
    """Rebuild the error behind a WebSocket close code; any other code means the link was lost."""
    for cls in all_errors():
        if cls.close_code == close_code:
            return cls(message)
    return ServerUnreachable(message or f"the connection was closed (code {close_code})")
