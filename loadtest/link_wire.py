"""One direction of an emulated link: when bytes leave, when they arrive, and the queue in between."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.precise_timer import PreciseTimer

# What a router on the way would queue; beyond it the sender has to wait.
QUEUE_BYTES = 256 * 1024
# Without a bandwidth nothing queues, but memory has its bounds.
UNSHAPED_BYTES = 16 * 2**20
# Bytes travel in pieces of at most this long, so that the end of a message need not wait for what was read with it.
PIECE_SECONDS = 0.0005
SMALLEST_PIECE = 1448


class Wire:
    """The clock of one direction, shared by all connections: bytes leave one after the other, then they travel."""

    def __init__(self, bytes_per_second: float | None, delay: float, jitter: float, seed: int) -> None:
        self._rate = bytes_per_second
        self._delay = delay
        self._jitter = jitter
        self._random = random.Random(seed)
        self._free_at = 0.0
        self.piece = max(SMALLEST_PIECE, int((bytes_per_second or 0) * PIECE_SECONDS))
        travelling = (bytes_per_second or 0) * (delay + jitter)
        self.limit = UNSHAPED_BYTES if bytes_per_second is None else QUEUE_BYTES + int(travelling)

    @property
    def shaped(self) -> bool:
        """Whether the bandwidth is bounded."""
        return self._rate is not None

    def carry(self, now: float, size: int) -> float:
        """Put `size` bytes on the wire; give the time at which the last one arrives."""
        if self._rate is not None:
            self._free_at = max(now, self._free_at) + size / self._rate
            now = self._free_at
        return now + self._delay + (self._random.uniform(-self._jitter, self._jitter) if self._jitter else 0.0)


@dataclass(slots=True)
class Gate:
    """While it is shut nothing arrives anywhere."""

    shut_until: float = 0.0


@dataclass(frozen=True, slots=True)
class _Item:
    due: float
    data: memoryview
    act: Callable[[asyncio.Transport], None] | None = None


class Lane:
    """One direction of one connection, from the transport `source` to the transport `sink`."""

    def __init__(self, wire: Wire, gate: Gate, source: asyncio.Transport, sink: asyncio.Transport) -> None:
        self._loop = asyncio.get_running_loop()
        self._wire = wire
        self._gate = gate
        self._source = source
        self._sink = sink
        self._timer = PreciseTimer(self._pump)
        self._queue: deque[_Item] = deque()
        self._last_due = 0.0
        self._held = 0
        self._paused = self._ended = self._closed = False
        self._blocked = self._frozen = False

    def feed(self, data: bytes) -> None:
        """Take what came from the source."""
        if self._closed:
            return
        view = memoryview(data)
        size = self._wire.piece if self._wire.shaped else len(data)
        for start in range(0, len(data), size):
            self._put(view[start : start + size])
        self._held += len(data)
        if self._held > self._wire.limit and not self._paused:
            self._paused = True
            self._source.pause_reading()
        self._pump()

    def feed_end(self, act: Callable[[asyncio.Transport], None]) -> None:
        """The source will send no more: let `act` happen to the sink once all that came before has arrived."""
        if self._closed:
            return
        self._ended = True
        self._put(memoryview(b""), act)
        self._pump()

    def block(self, blocked: bool) -> None:
        """Wait with delivering, or go on: the sink's buffer is full, or empty again."""
        self._blocked = blocked
        if not blocked:
            self._pump()

    def freeze(self) -> None:
        """Let nothing arrive any more, without a word to anybody."""
        self._frozen = True

    def close(self) -> None:
        """Forget everything."""
        self._closed = True
        self._queue.clear()
        self._timer.close()

    def _put(self, data: memoryview, act: Callable[[asyncio.Transport], None] | None = None) -> None:
        # Jitter must not change the order: TCP would wait for the piece before, too.
        self._last_due = max(self._last_due, self._wire.carry(self._loop.time(), len(data)))
        self._queue.append(_Item(self._last_due, data, act))

    def _pump(self) -> None:
        now = self._loop.time() + self._timer.lead
        while self._queue and not (self._blocked or self._frozen or self._closed):
            item = self._queue[0]
            due = max(item.due, self._gate.shut_until)
            if due > now:
                self._timer.at(due)
                break
            self._queue.popleft()
            self._deliver(item)
        if self._paused and not self._ended and self._held <= self._wire.limit - QUEUE_BYTES // 2:
            self._paused = False
            self._source.resume_reading()

    def _deliver(self, item: _Item) -> None:
        if item.act is not None:
            item.act(self._sink)
            return
        self._held -= len(item.data)
        self._sink.write(item.data)
