"""One answer of the chat: it can be stopped at any token and stays usable, and a lost server is waited for in words."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from edge_client.generate import EdgeSession, GenerationStats
from edge_client.runtime import EdgeRuntime
from edge_client.session_state import Phase
from edge_client.turn import FinishReason, GenerationParams, TokenEvent

# How long a stopped answer may take to come to its end, one token further, before it is cut off.
STOP_SECONDS = 1.0
LOOK_SECONDS = 0.5


class StopSwitch:
    """A constraint of an answer that allows everything and is complete once it was switched.

    So a stopped answer ends as any other does, with its session in order, and the next turn goes on from it.
    """

    def __init__(self) -> None:
        self.is_on = False

    @property
    def finished(self) -> bool:
        """Whether the answer is to end at this token."""
        return self.is_on

    def mask(self, logits: Tensor) -> Tensor:
        """Leave the choice as it is."""
        return logits

    def take(self, token: int) -> None:
        """Nothing depends on the token."""


@dataclass(slots=True)
class Made:
    """What there is of an answer; filled while it comes, so that nothing is lost when it is cut off."""

    switch: StopSwitch = field(default_factory=StopSwitch)
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.pieces)


class Stopper:
    """Ctrl-C: first the switch and a little patience, then, or when it comes again, the end."""

    def __init__(self, made: Made, task: asyncio.Task[None]) -> None:
        self._made, self._task = made, task
        self._timer: asyncio.TimerHandle | None = None

    def press(self) -> None:
        """Take one Ctrl-C; call it in the event loop."""
        if self._made.switch.is_on:
            self._task.cancel()
            return
        self._made.switch.is_on = True
        # Before the first token there is nothing to be kept, and the prompt may be long.
        patience = STOP_SECONDS if self._made.tokens else 0.0
        self._timer = asyncio.get_running_loop().call_later(patience, self._task.cancel)

    def release(self) -> None:
        """The answer is over."""
        if self._timer is not None:
            self._timer.cancel()


async def make_answer(
    edge: EdgeRuntime,
    ids: Sequence[int],
    params: GenerationParams,
    made: Made,
    *,
    show: Callable[[str], None],
    notify: Callable[[str], None],
) -> None:
    """Make one answer on the conversation's session. Raises `FlLlamaError`; `made` has what came until then."""
    turn = edge.turn(ids, dataclasses.replace(params, constraint=lambda: made.switch))
    async with edge.conversations.session(ids) as session:
        made.stats = session.stats
        async with contextlib.aclosing(session.generate(ids, turn)) as events:
            async for event in _patiently(events, session, notify):
                made.tokens.append(event.token)
                made.pieces.append(event.text)
                made.finish_reason = event.finish_reason
                show(event.text)


async def _patiently(
    events: AsyncIterator[TokenEvent], session: EdgeSession, notify: Callable[[str], None]
) -> AsyncIterator[TokenEvent]:
    """Give the events; say when the server is lost meanwhile, and when it is back."""
    is_lost = False
    while True:
        coming = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait((coming,), timeout=LOOK_SECONDS))[0]:
                if not is_lost and session.remote.state.phase is Phase.DETACHED:
                    is_lost = True
                    notify("the connection to the server was lost; waiting for it to come back")
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        if is_lost:
            is_lost = False
            if coming.exception() is None:
                notify("the server is back, the answer goes on")
        try:
            event = await coming
        except StopAsyncIteration:
            return
        yield event
