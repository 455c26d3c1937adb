"""What a server offers to an extension, and what it expects of one.

An extension is found by its entry point (group `fl_llama.extensions`), whose object is called with a `Host`. So the
server runs split fine-tuning without knowing it, and fine-tuning knows the server only by what is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.layers import Segment
from split_llama.wire.frame import Frame

ENTRY_POINTS = "fl_llama.extensions"

T = TypeVar("T")

Send = Callable[[Frame | Iterator[Frame]], None]
"""Queues a frame for a client, or the frames of a long message; the handle is filled in, the order stays.

Never blocks, never raises, and does nothing once the client left. Frames of an iterator are asked for as they are sent,
so nothing of a long message is copied before; they are no backlog of a slow reader, whoever gives them bounds them. An
iterator that raises a `ConnectionRefused` ends the connection.
"""


class Guest(Protocol):
    """A client of an extension, behind one handle of one connection. Everything happens on the event loop."""

    @property
    def is_busy(self) -> bool:
        """Say whether answers are still to come."""
        ...

    def receive(self, frame: Frame) -> None:
        """Take a frame for the handle, any kind but JOIN. Raises `RequestRefused`, which becomes an ERROR frame."""
        ...

    def leave(self) -> None:
        """The client said CLOSE: it does not come back. The server answers with CLOSE by itself."""
        ...

    def detach(self) -> None:
        """The connection is gone; the client may come back with another JOIN."""
        ...


class Extension(Protocol):
    """Something that a server runs beside inference."""

    name: str

    def router(self) -> Any:
        """Give the REST routes (a FastAPI `APIRouter`), under paths of their own."""
        ...

    def join(self, frame: Frame, owner: str, send: Send) -> Guest:
        """Take a JOIN in. `owner` is whose API key it is. Raises `FlLlamaError`."""
        ...

    async def start(self) -> None:
        """The model is there: begin. Returns at once; what goes on is the extension's own tasks."""
        ...

    async def close(self) -> None:
        """The server ends: put everything in order."""
        ...


class Host(Protocol):
    """The server. All but `dense_segment` is for the event loop."""

    @property
    def is_ready(self) -> bool:
        """Say whether the model is loaded; until then what follows raises `ServerUnreachable`."""
        ...

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint behind it."""
        ...

    @property
    def blocks(self) -> BlockRange:
        """The blocks that are hosted."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        ...

    @property
    def max_frame_bytes(self) -> int:
        """Bytes of the largest frame."""
        ...

    @property
    def folder(self) -> Path:
        """Where the extension may keep files; it need not exist yet."""
        ...

    @property
    def plugins(self) -> Collection[str]:
        """Names (`module:Class`) of code that clients may ask the extension to run: the operator allows it."""
        ...

    @property
    def memory_bytes(self) -> int:
        """How much memory the extension may use for what is under way."""
        ...

    def authenticate(self, authorization: str | None) -> str:
        """Give the owner of an Authorization header's key. Raises `Unauthenticated`."""
        ...

    async def check_model(
        self, blocks: BlockRange, geometry: str | None, weights: str | None, tokenizer: str | None
    ) -> None:
        """Check a client's digests of what it holds around `blocks`; null is not checked.

        Raises `ModelMismatch`, `PartitionNotAllowed`.
        """
        ...

    def dense_segment(self, dtype: torch.dtype) -> Segment:
        """Give the hosted blocks as dense, frozen matrices of a type; loaded once for all. Blocking."""
        ...

    async def compute(self, work: Generator[None, None, T]) -> T:
        """Run a generator to its end in the thread that computes, and give what it returns.

        It is resumed in quanta between the passes of inference, which go first; so it should yield often. Works run one
        after the other in the order in which they came. Raises what it raises. It must not be cancelled half-way: a
        cancelled call leaves the work running.
        """
        ...

    async def in_background(self, work: Callable[[], T]) -> T:
        """Run something blocking (a file, loading weights) in a thread of its own."""
        ...

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        """Make a Prometheus counter, under the server's prefix."""
        ...

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever somebody asks."""
        ...
