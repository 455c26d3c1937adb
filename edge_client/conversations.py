"""Sessions kept for the next turn: a request runs on a fork of the one that has most of its tokens.

A request never touches what it was forked from. So one that fails, or whose caller leaves, just closes its fork: its
pages are free at once and the conversation is as it was before. One that ends well is parked, and replaces whatever it
continues. Two requests on one conversation fork it twice.

An owner finds only what the same owner has parked: how much of a prompt is cached tells what was said before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass

from edge_client.generate import EdgeSession

# Prompts of strangers begin alike (BOS, a template's first words); forking for so little is not worth a message.
LEAST_SHARED = 8

OpenSession = Callable[[], Awaitable[EdgeSession]]
ForkSession = Callable[[EdgeSession, int], Awaitable[EdgeSession]]
CloseSession = Callable[[EdgeSession], Coroutine[None, None, None]]


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    session: EdgeSession
    owner: str


class Conversations:
    """Keeps at most `most_sessions` sessions of `most_tokens` in all; those unused longest go first."""

    def __init__(
        self,
        open_session: OpenSession,
        fork_session: ForkSession,
        close_session: CloseSession,
        *,
        most_sessions: int,
        most_tokens: int,
    ) -> None:
        self._open, self._fork, self._close = open_session, fork_session, close_session
        self._most_sessions, self._most_tokens = most_sessions, most_tokens
        self._parked: list[_Parked] = []  # the one used last at the end
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._parked)

    @contextlib.asynccontextmanager
    async def session(self, ids: Sequence[int], *, fresh: bool = False, owner: str = "") -> AsyncIterator[EdgeSession]:
        """Give a session that has as much of `ids` as `owner` has parked, less the last token; `fresh` an empty one.

        Left as usual, it is parked for the next turn. Left by an exception it is closed, and nothing else has changed.
        """
        parent, shared = (None, 0) if fresh else self._longest(ids, owner)
        session = await self._open() if parent is None else await self._fork(parent, shared)
        try:
            yield session
        except BaseException:
            self._close_soon(session)
            raise
        self._park(_Parked(session, owner))

    @contextlib.asynccontextmanager
    async def branches(self, ids: Sequence[int], count: int, *, owner: str = "") -> AsyncIterator[list[EdgeSession]]:
        """Give `count` sessions that all have `ids` but the last token; the prompt is computed once, for the first.

        The prompt is parked when all goes well, the branches are closed in any case.
        """
        async with contextlib.AsyncExitStack() as stack:
            trunk = await stack.enter_async_context(self.session(ids, owner=owner))
            if len(ids) - 1 > len(trunk.tokens):
                await trunk.prefill(ids[:-1])
            # It may itself be a fork that the server has not confirmed yet.
            await trunk.remote.idle()
            sessions = []
            for _ in range(count):
                sessions.append(await self._fork(trunk, len(ids) - 1) if len(ids) > 1 else await self._open())
                stack.callback(self._close_soon, sessions[-1])
            sessions[0].carry(trunk.stats)
            yield sessions

    def give_up_one(self) -> None:
        """Close what was unused longest: somebody else needs the room."""
        if self._parked:
            self._close_soon(self._parked.pop(0).session)

    async def clear(self) -> None:
        """Close all that is parked, and wait for whatever is being closed."""
        parked, self._parked = self._parked, []
        for each in parked:
            self._close_soon(each.session)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _longest(self, ids: Sequence[int], owner: str) -> tuple[EdgeSession | None, int]:
        """Find the parked session that shares most with `ids`, and how much; the last token is always to be fed."""
        best: tuple[_Parked | None, int] = (None, LEAST_SHARED - 1)
        wanted = list(ids[:-1])
        for parked in self._parked:
            if parked.owner != owner or parked.session.remote.error is not None:
                continue
            if (shared := _shared(parked.session.tokens, wanted)) > best[1]:
                best = (parked, shared)
        parent, shared = best
        if parent is None:
            return None, 0
        self._parked.remove(parent)
        self._parked.append(parent)
        return parent.session, shared

    def _park(self, new: _Parked) -> None:
        tokens = new.session.tokens
        kept = []
        for parked in self._parked:
            length = len(parked.session.tokens)
            superseded = parked.owner == new.owner and parked.session.tokens == tokens[:length]
            if superseded or parked.session.remote.error is not None:
                self._close_soon(parked.session)
            else:
                kept.append(parked)
        self._parked = [*kept, new]
        while len(self._parked) > self._most_sessions or self._held_tokens() > self._most_tokens:
            self.give_up_one()

    def _held_tokens(self) -> int:
        return sum(len(parked.session.tokens) for parked in self._parked)

    def _close_soon(self, session: EdgeSession) -> None:
        """Close without making anybody wait, a cancelled caller least of all."""
        task = asyncio.create_task(self._close(session), name="close-session")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _shared(left: list[int], right: list[int]) -> int:
    """Length of the common beginning, by halving: slices compare at the speed of memory."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
