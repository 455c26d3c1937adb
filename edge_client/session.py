"""A session on the server, as the edge's event loop sees it: submit rows, take answers, whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable

from edge_client.session_events import Answer, Closed, Failed, Redirected, Retry
from edge_client.session_state import Phase, SessionState
from edge_client.step_log import EncodedRows
from split_llama.errors import FlLlamaError
from split_llama.mask import MAX_TREE_NODES
from split_llama.wire.codec import Codec
from split_llama.wire.control import Open
from split_llama.wire.frame import Frame

CLOSE_SECONDS = 2.0


def new_opening(opening: Open) -> Open:
    """Give `opening` with a fresh session id and secret."""
    return opening.model_copy(update={"session": secrets.token_hex(16), "secret": secrets.token_hex(32)})


class RemoteSession:
    """Made by `ServerLink.open`. Answers come in the order of the steps.

    `bytes_up` and `bytes_down` count this session's frames, headers included (not the transport's own framing).
    `answered_at` is when the last answer came, in seconds of `time.perf_counter`. `redirect` is told the address of the
    server that this one names in its place; `refused` hears that the server has no room for now.
    """

    def __init__(
        self,
        state: SessionState,
        deadline: float,
        kick: Callable[[RemoteSession], None],
        redirect: Callable[[str], None],
        refused: Callable[[], None],
    ) -> None:
        self.state = state
        self.bytes_up = 0
        self.bytes_down = 0
        self._deadline = deadline
        self.answered_at = 0.0
        self._kick = kick
        self._redirect = redirect
        self._refused = refused
        self._answers: deque[Answer] = deque()
        self._changed = asyncio.Event()
        self._error: FlLlamaError | None = None
        self._refused_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, first: int, rows: EncodedRows, flags: int = 0) -> None:
        """Send rows for the positions from `first` on, as one step or several; `flags` is for every one of them."""
        for piece in rows.cut(self.state.rows_per_step(rows.codec)):
            self.state.submit(first, piece, flags)
            first += piece.count
        self._kick(self)

    def submit_draft(self, first: int, rows: EncodedRows, tree: tuple[int, ...]) -> None:
        """Send a draft of at most `max_draft_rows` rows, `tree` with its ancestor bits; `settle` follows its answer."""
        self.state.submit_draft(first, rows, tree)
        self._kick(self)

    def settle(self, path: tuple[int, ...]) -> None:
        """Keep these nodes of the answered draft."""
        self.state.settle(path)

    def max_draft_rows(self, codec: Codec) -> int:
        """How many rows a draft may have: it is one step, hence one frame."""
        return min(self.state.rows_per_step(codec), MAX_TREE_NODES)

    @property
    def error(self) -> FlLlamaError | None:
        """What ended the session, if anything did."""
        return self._error

    async def take(self) -> list[Answer]:
        """Wait for answers; give all that are there. Raises what ended the session."""
        while not self._answers:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        answers = list(self._answers)
        self._answers.clear()
        return answers

    async def idle(self) -> None:
        """Wait until nothing is under way, so that the session can be forked. Raises what ended the session."""
        while not self.state.is_idle:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()

    async def close(self) -> None:
        """Close on the server, and wait a little for its word."""
        if self._timer is not None:
            self._timer.cancel()
        reachable = self.state.phase not in (Phase.CLOSED, Phase.DETACHED)
        self.state.close()
        if not reachable:
            return
        self._kick(self)
        with contextlib.suppress(TimeoutError, FlLlamaError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._error is None:
                    self._changed.clear()
                    await self._changed.wait()

    def take_frames(self) -> list[Frame]:
        """Give the frames to send now (for the link)."""
        frames = self.state.take_frames()
        self.bytes_up += sum(frame.size for frame in frames)
        return frames

    def on_frame(self, frame: Frame) -> None:
        """Take a frame for this session (from the link)."""
        self.bytes_down += frame.size
        try:
            events = self.state.on_frame(frame)
        except FlLlamaError as error:
            self.fail(error)
            return
        for event in events:
            match event:
                case Answer():
                    self.answered_at = time.perf_counter()
                    self._refused_since = None
                    self._answers.append(event)
                case Retry(delay_ms, refusal):
                    self._refused()
                    self._schedule_retry(delay_ms / 1000, refusal)
                case Failed(failure):
                    self._error = failure
                case Redirected(address):
                    self._redirect(address)
                case Closed():
                    self._error = self._error or FlLlamaError("the server closed the session")
        self._changed.set()
        self._kick(self)

    def fail(self, error: FlLlamaError) -> None:
        """End the session with `error`."""
        self.state.close()
        self._error = self._error or error
        self._changed.set()

    def _schedule_retry(self, delay: float, error: FlLlamaError) -> None:
        loop = asyncio.get_running_loop()
        self._refused_since = self._refused_since or loop.time()
        if loop.time() + delay - self._refused_since > self._deadline:
            self.fail(error)
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(delay, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self.state.retry()
        self._kick(self)
