"""The emulated link: its clock as arithmetic, its connections with a real echo server."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.cli import main
from loadtest.link_pair import Direction
from loadtest.link_proxy import Link, LinkProxy
from loadtest.link_wire import QUEUE_BYTES, SMALLEST_PIECE, UNSHAPED_BYTES, Wire
from loadtest.proxy_process import proxy_process
from split_llama.errors import UsageError

BLOCK = 64 * 1024


@contextlib.asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    tasks: set[asyncio.Task[None]] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(BLOCK):
                writer.write(data)
                await writer.drain()
            # Half-closed by the client: what it sent last has gone back before this ends the other half.
            writer.write_eof()
        writer.close()

    server = await asyncio.start_server(
        lambda reader, writer: tasks.add(asyncio.create_task(echo(reader, writer))), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()[1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def through(link: Link) -> AsyncIterator[tuple[LinkProxy, asyncio.StreamReader, asyncio.StreamWriter]]:
    async with echo_server() as port, LinkProxy("127.0.0.1", port, link) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            yield proxy, reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def test_bytes_leave_one_after_the_other_and_then_travel() -> None:
    wire = Wire(1000.0, 2.0, 0.0, 0)
    assert wire.carry(10.0, 500) == 12.5
    assert wire.carry(10.1, 1000) == 13.5, "the wire is busy until 10.5"
    assert wire.carry(20.0, 0) == 22.0, "an idle wire makes up for nothing"
    assert Wire(None, 2.0, 0.0, 0).carry(10.0, 10**9) == 12.0


@given(st.integers(0, 1000), st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_a_burst_takes_its_size_over_the_bandwidth_whatever_its_pieces(seed: int, sizes: list[int]) -> None:
    wire = Wire(1e4, 0.5, 0.25, seed)
    arrivals = [wire.carry(0.0, size) for size in sizes]
    leaves = 0.0
    for size, arrival in zip(sizes, arrivals, strict=True):
        leaves += size / 1e4
        assert leaves + 0.25 - 1e-9 <= arrival <= leaves + 0.75 + 1e-9
    again = Wire(1e4, 0.5, 0.25, seed)
    assert [again.carry(0.0, size) for size in sizes] == arrivals, "the seed fixes the jitter"


def test_the_queue_holds_what_travels_and_a_routers_worth() -> None:
    link = Link(delay_ms=40, up_mbit=50)
    assert link.wire("up").limit == QUEUE_BYTES + 250_000
    assert link.wire("down").limit == UNSHAPED_BYTES
    assert link.wire("up").piece == 3125
    assert Link(up_mbit=1).wire("up").piece == SMALLEST_PIECE


@pytest.mark.parametrize(
    "values", [{"delay_ms": -1}, {"jitter_ms": 1}, {"delay_ms": 1, "jitter_ms": 2}, {"up_mbit": 0}, {"down_mbit": -5}]
)
def test_a_link_that_cannot_be_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Link(**values)  # type: ignore[arg-type]


async def test_everything_arrives_once_and_in_order_under_jitter() -> None:
    data = random.Random(1).randbytes(700_000)
    async with through(Link(delay_ms=3, jitter_ms=3, up_mbit=200, down_mbit=200)) as (proxy, reader, writer):

        async def send() -> None:
            for start in range(0, len(data), 7001):
                writer.write(data[start : start + 7001])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        assert await reader.read(-1) == data, "the end of the stream came through both ways, after the last byte"
        await sending
        counters = proxy.counters
    assert (counters.connections, counters.bytes_up, counters.bytes_down) == (1, len(data), len(data))
    assert proxy.live == 0


async def test_nothing_arrives_before_its_time() -> None:
    """A lower bound holds on a busy machine too."""
    loop = asyncio.get_running_loop()
    async with through(Link(delay_ms=30)) as (_, reader, writer):
        start = loop.time()
        writer.write(b"first")
        assert await reader.readexactly(5) == b"first"
        assert loop.time() - start > 0.118, "the handshake's round trip, and its own"
        start = loop.time()
        writer.write(b"second")
        assert await reader.readexactly(6) == b"second"
        assert loop.time() - start > 0.058
    async with through(Link(up_mbit=8)) as (_, reader, writer):
        start = loop.time()
        writer.write(bytes(100_000))
        await reader.readexactly(100_000)
        assert loop.time() - start > 0.098


async def test_a_receiver_that_does_not_read_stops_the_sender() -> None:
    async with through(Link()) as (proxy, reader, writer):
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 256 * BLOCK * 16:
                writer.write(bytes(BLOCK))
                await asyncio.wait_for(writer.drain(), 1.0)
                sent += BLOCK
        assert sent < 256 * BLOCK * 16, "somewhere it was held back"
        assert proxy.counters.bytes_up < sent + BLOCK
        back = 0
        while back < sent:
            back += len(await reader.read(2**20))


async def test_a_cut_resets_all_and_new_connections_are_welcome() -> None:
    async with through(Link()) as (proxy, reader, writer):
        second_reader, second = await asyncio.open_connection("127.0.0.1", proxy.port)
        for one, other in ((writer, reader), (second, second_reader)):
            one.write(b"x")
            await other.readexactly(1)
        assert proxy.cut() == 2
        for one in (reader, second_reader):
            with pytest.raises(ConnectionResetError):
                await one.read(1)
        second.close()
        third_reader, third = await asyncio.open_connection("127.0.0.1", proxy.port)
        third.write(b"again")
        assert await third_reader.readexactly(5) == b"again"
        third.close()
        assert (proxy.counters.cuts, proxy.counters.connections) == (1, 3)


async def test_refused_connections_are_reset_for_a_while() -> None:
    async with through(Link()) as (proxy, reader, writer):
        proxy.refuse(600)
        other, pen = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await other.read(1)
        pen.close()
        writer.write(b"old ones live")
        assert await reader.readexactly(13) == b"old ones live"
        assert proxy.counters.refused == 1
        proxy.refuse(0)
        again, pen = await asyncio.open_connection("127.0.0.1", proxy.port)
        pen.write(b"x")
        assert await again.readexactly(1) == b"x"
        pen.close()


async def test_a_stall_loses_nothing() -> None:
    loop = asyncio.get_running_loop()
    async with through(Link()) as (proxy, reader, writer):
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        proxy.stall(0.3)
        start = loop.time()
        writer.write(b"b")
        assert await reader.readexactly(1) == b"b"
        assert loop.time() - start > 0.295


async def test_frozen_connections_are_silent_and_new_ones_work() -> None:
    async with through(Link()) as (proxy, reader, writer):
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        assert proxy.freeze() == 1
        writer.write(b"b")
        other, pen = await asyncio.open_connection("127.0.0.1", proxy.port)
        pen.write(b"c")
        assert await other.readexactly(1) == b"c", "b was sent before, and had time"
        pen.close()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.05)


async def test_a_target_that_is_not_there_or_breaks_off_resets_the_client() -> None:
    async with echo_server() as port:
        pass
    async with LinkProxy("127.0.0.1", port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        assert proxy.live == 0
    async with through(Link(delay_ms=1)) as (inner, reader, writer), LinkProxy("127.0.0.1", inner.port) as outer:
        far_reader, far = await asyncio.open_connection("127.0.0.1", outer.port)
        far.write(b"x")
        assert await far_reader.readexactly(1) == b"x"
        inner.cut()
        with pytest.raises(ConnectionResetError):
            await far_reader.read(1)
        far.close()


async def test_the_tap_hears_every_byte_with_its_direction_and_connection() -> None:
    heard: dict[tuple[int, Direction], bytes] = {}

    def tap(number: int, direction: Direction, data: bytes) -> None:
        heard[number, direction] = heard.get((number, direction), b"") + data

    async with echo_server() as port, LinkProxy("127.0.0.1", port, tap=tap) as proxy:
        for text in (b"one", b"two"):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(text)
            assert await reader.readexactly(3) == text
            writer.close()
    assert heard == {(1, "up"): b"one", (1, "down"): b"one", (2, "up"): b"two", (2, "down"): b"two"}


def test_the_command_ends_by_itself() -> None:
    flags = ["--target", "http://127.0.0.1:9", "--stall-every", "0.02", "--duration", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", "proxy", *flags], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("http://127.0.0.1:")
    assert done.stderr == "0 connections, 0 cuts, 0 bytes up, 0 bytes down\n"


async def test_the_command_forwards_and_cuts_until_it_is_ended() -> None:
    async with echo_server() as port:
        flags = ["--rtt", "4", "--cut-every", "1"]
        command = [sys.executable, "-m", "loadtest", "proxy", "--target", f"http://127.0.0.1:{port}/team", *flags]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/team\n", url)
        assert found, "the root path stays"
        reader, writer = await asyncio.open_connection("127.0.0.1", int(found[1]))
        writer.write(b"there and back")
        assert await reader.readexactly(14) == b"there and back"
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        process.terminate()
        _, errors = await process.communicate()
    assert process.returncode == 0
    assert re.fullmatch(rb"1 connections, \d+ cuts, 14 bytes up, 14 bytes down\n", errors)


async def test_the_proxy_process_lasts_as_long_as_its_block() -> None:
    async with echo_server() as port:
        with proxy_process(f"http://127.0.0.1:{port}", "--delay", "1") as url:
            number = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", number)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "http://192.0.2.1:80"], "--allow-remote"),
        (["--target", "http://127.0.0.1:9", "--rtt", "-1"], "delay of 0 ms or more"),
        (["--target", "http://127.0.0.1:9", "--duration", "0"], "--duration 0"),
        (["--target", "http://127.0.0.1:9", "--port", "70000"], "between 0 and 65535"),
        (["--target", "127.0.0.1:9"], "no http:// or https://"),
    ],
)
def test_mistakes_are_explained(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["proxy", *flags]) == 2
    assert words in capsys.readouterr().err
