"""What waits to be sent to one edge process: short frames first, long messages of extensions cut as there is room."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator

from split_llama.errors import SlowReader
from split_llama.wire.frame import Frame

# A handle's messages that may wait: far more than an extension has answers to give, and few enough to be forgotten.
MAX_LETTERS = 4096

Parts = tuple[bytes, bytes | memoryview]


class _Letter:
    """One message of an extension: its frames, one of them looked at already. `counted` bytes are backlog."""

    def __init__(self, frames: Iterator[Frame], handle: int, counted: int) -> None:
        self.counted = counted
        self._frames = frames
        self._handle = handle
        self._head: Parts | None = None

    def head(self) -> Parts | None:
        """Give the next frame, none after the last one."""
        if self._head is None and (frame := next(self._frames, None)) is not None:
            self._head = (frame.header(self._handle), frame.payload)
        return self._head

    def advance(self) -> None:
        """Go on to the frame after."""
        self._head = None


class Outbox:
    """Frames waiting to be sent; above `max_bytes` of them the reader counts as too slow.

    Messages put in with `put_long` are not in memory before there is room for their frames, and do not count: who gave
    them bounds them. They come after all other frames, handle by handle; the order within a handle stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[Parts] = deque()
        self._letters: dict[int, deque[_Letter]] = {}
        self._wake = asyncio.Event()
        self._finishing = False
        self._overflows = False
        self.size = 0

    @property
    def is_empty(self) -> bool:
        """Say whether nothing waits."""
        return not (self._frames or self._letters)

    def put(self, frame: Frame, handle: int | None = None) -> None:
        """Queue a frame, under another handle if one is given.

        Beyond the limit it is dropped: the connection is lost anyway and will be told why.
        """
        handle = frame.handle if handle is None else handle
        self.size += frame.size
        if self.size <= self._max_bytes:
            if handle in self._letters:
                self._post(_Letter(iter((frame,)), handle, frame.size), handle)
            else:
                self._frames.append((frame.header(handle), frame.payload))
        self._wake.set()

    def put_long(self, frames: Iterator[Frame], handle: int) -> None:
        """Queue the frames of a long message, which are asked for as they are sent."""
        self._post(_Letter(frames, handle, 0), handle)
        self._wake.set()

    def _post(self, letter: _Letter, handle: int) -> None:
        letters = self._letters.setdefault(handle, deque())
        self._overflows = self._overflows or len(letters) >= MAX_LETTERS
        if not self._overflows:
            letters.append(letter)

    def drop(self, handle: int) -> None:
        """Forget what waits behind or in a handle's long messages."""
        self.size -= sum(letter.counted for letter in self._letters.pop(handle, ()))
        self._rest()

    def finish(self) -> None:
        """Say that nothing more will come: `wait` says no once all is taken."""
        self._finishing = True
        self._wake.set()

    async def wait(self) -> bool:
        """Wait until there is something to send; says no when there never will be."""
        await self._wake.wait()
        return not (self._finishing and self.is_empty)

    def take(self, max_message_bytes: int) -> bytes:
        """Give what is queued as one message, or as much of it as fits; empty if nothing is.

        Raises `SlowReader`, and what the iterator of a long message raises.
        """
        if self.size > self._max_bytes:
            raise SlowReader(f"{self.size} bytes of replies wait unread, {self._max_bytes} may; read while you send")
        if self._overflows:
            raise SlowReader(f"{MAX_LETTERS} messages wait unread; read while you send")
        taken: list[bytes | memoryview] = []
        room = max_message_bytes
        while self._frames:
            header, payload = self._frames[0]
            room -= len(header) + len(payload)
            if room < 0 and taken:
                break
            taken += self._frames.popleft()
            self.size -= len(header) + len(payload)
        if not self._frames:
            self._take_long(taken, room)
        self._rest()
        return b"".join(taken)

    def _take_long(self, taken: list[bytes | memoryview], room: int) -> None:
        """Add frames of long messages as far as they fit; each handle's turn is one message."""
        while self._letters:
            handle, letters = next(iter(self._letters.items()))
            letter = letters[0]
            while (parts := letter.head()) is not None:
                room -= sum(map(len, parts))
                if room < 0 and taken:
                    return
                taken += parts
                letter.advance()
            self.size -= letter.counted
            letters.popleft()
            del self._letters[handle]
            if letters:
                self._letters[handle] = letters

    def _rest(self) -> None:
        if self.is_empty and not self._finishing:
            self._wake.clear()
