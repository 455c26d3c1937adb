"""How far away the server is, and what it takes to compute: from messages that hold nothing but random numbers.

The round trip is that of OPEN and CLOSE, which cost the server no pass. Bandwidth comes from pairs of steps that differ
in their codec alone: the server computes the same for both, so the difference in time is that of the bytes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time

import numpy as np

from edge_client.connector import Connector
from edge_client.link import ServerLink
from edge_client.planning.cost import Curve, LinkSpeed
from edge_client.session import RemoteSession, new_opening
from edge_client.settings import EdgeSettings
from edge_client.step_log import EncodedRows
from split_llama.errors import NotAServer
from split_llama.transport.base import Channel, ChannelClosed
from split_llama.wire.codec import Codec, encode_rows, row_bytes
from split_llama.wire.control import Open, error_from_frame
from split_llama.wire.frame import HEADER_SIZE, Flag, Frame, Kind, split_message

ROUND_TRIPS = 12
REPEATS = 5
# A difference of two times below this says nothing: both come from clocks, threads and schedulers.
LEAST_SECONDS = 0.0003
ROWS = (1, 4, 16, 64)
# A step this large is slow on any link; more rows would make it no truer.
MOST_ROWS = 256


async def measure_round_trip(settings: EdgeSettings, opening: Open, count: int = ROUND_TRIPS) -> float:
    """Give the median time of an empty round trip in seconds, over a connection of its own. Raises `FlLlamaError`."""
    channel = await Connector.of(settings).connect()
    try:
        seconds = []
        for handle in range(1, 1 + (count + 1) // 2):
            payload = new_opening(opening).to_bytes()
            seconds.append(await _exchange(channel, Frame(Kind.OPEN, handle=handle, payload=payload)))
            seconds.append(await _exchange(channel, Frame(Kind.CLOSE, handle=handle)))
    except ChannelClosed as closed:
        raise closed.error() from closed
    finally:
        with contextlib.suppress(ChannelClosed):
            await channel.close()
    return statistics.median(seconds)


async def _exchange(channel: Channel, frame: Frame) -> float:
    begin = time.perf_counter()
    await channel.send(frame.encode())
    reply = next(split_message(await channel.receive()), None)
    seconds = time.perf_counter() - begin
    if reply is not None and reply.kind is Kind.ERROR:
        raise error_from_frame(reply)
    if reply is None or reply.kind is not frame.kind:
        raise NotAServer(f"the server did not answer {frame.kind.name} with {frame.kind.name}")
    return seconds


class Prober:
    """Sends random rows in sessions of its own and times the answers."""

    def __init__(self, link: ServerLink, opening: Open) -> None:
        self._link = link
        self._opening = opening
        self._width = link.hello.hidden_size
        self._random = np.random.default_rng(0)

    async def bandwidth(self, round_trip: float) -> LinkSpeed:
        """Measure bytes per second each way, over one block: what the server computes hardly varies then."""
        start = self._opening.blocks[0]
        steps = self._open((start, start + 1))
        try:
            rows = min(MOST_ROWS, self._link.hello.max_model_len, steps.most_rows(Codec.FP32))
            wide, narrow = self._rows(Codec.FP32, rows), self._rows(Codec.INT8, rows)
            kinds = [(wide, Flag.REPLY_NONE), (narrow, Flag.REPLY_NONE), (wide, 0), (narrow, 0)]
            times: list[list[float]] = [[] for _ in kinds]
            for _ in range(1 + REPEATS):
                for measured, (sent, flags) in zip(times, kinds, strict=True):
                    measured.append(await steps.time(sent, flags))
        finally:
            await steps.close()
        # Whatever else happens only adds; that includes the connection's window, which the first ones open.
        up_wide, up_narrow, both_wide, both_narrow = map(min, times)
        size = rows * (row_bytes(Codec.FP32, self._width) - row_bytes(Codec.INT8, self._width))
        up = up_wide - up_narrow
        return LinkSpeed(round_trip, _rate(size, up), _rate(size, both_wide - both_narrow - max(0.0, up)))

    async def steps(self, link: LinkSpeed) -> Curve:
        """Time the server's steps by their rows: the least times, less way and bytes."""
        steps = self._open(self._opening.blocks)
        try:
            most = min(self._link.hello.max_model_len, steps.most_rows(Codec.FP16))
            counts = sorted({min(count, most) for count in ROWS})
            sent = {count: self._rows(Codec.FP16, count) for count in counts}
            times: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(1 + REPEATS):
                for count in counts:
                    times[count].append(await steps.time(sent[count]) - _way(link, sent[count]))
        finally:
            await steps.close()
        return Curve.of({count: max(0.0, min(seconds)) for count, seconds in times.items()})

    def _open(self, blocks: tuple[int, int]) -> _Steps:
        return _Steps(self._link, self._link.open(self._opening.model_copy(update={"blocks": blocks})))

    def _rows(self, codec: Codec, count: int) -> EncodedRows:
        states = self._random.standard_normal((count, self._width), np.float32)
        return EncodedRows(codec, count, encode_rows(codec, states))


class _Steps:
    """A session whose steps are timed one by one; each begins anew at position 0."""

    def __init__(self, link: ServerLink, remote: RemoteSession) -> None:
        self._link = link
        self._remote = remote

    def most_rows(self, codec: Codec) -> int:
        return self._remote.state.rows_per_step(codec)

    async def time(self, rows: EncodedRows, flags: int = 0) -> float:
        begin = time.perf_counter()
        self._remote.submit(0, rows, flags)
        await self._remote.take()
        return self._remote.answered_at - begin

    async def close(self) -> None:
        await self._link.close(self._remote)


def _rate(size: int, seconds: float) -> float:
    return size / seconds if seconds >= LEAST_SECONDS else math.inf


def _way(link: LinkSpeed, rows: EncodedRows) -> float:
    """Seconds of a step and its answer without the server's work."""
    size = HEADER_SIZE + len(rows.data)
    return link.round_trip + size / link.up + size / link.down
