from __future__ import annotations

import asyncio

import pytest

from split_llama.errors import BadFrame
from split_llama.transport.base import Channel, ChannelClosed, Pipe, short_reason
from split_llama.transport.inprocess import InProcessTransport, channel_pair


async def test_a_pair_carries_messages_both_ways_in_order() -> None:
    near, far = channel_pair()
    for message in (b"1", b"2"):
        await near.send(message)
        await far.send(message * 2)
    assert [await far.receive(), await far.receive()] == [b"1", b"2"]
    assert [await near.receive(), await near.receive()] == [b"11", b"22"]


async def test_what_was_sent_before_closing_can_still_be_read() -> None:
    near, far = channel_pair()
    await near.send(b"last")
    await near.close(4401, "enough")
    assert await far.receive() == b"last"
    for channel in (near, far):
        with pytest.raises(ChannelClosed, match="enough") as caught:
            await channel.receive()
        assert isinstance(caught.value.error(), BadFrame)
        with pytest.raises(ChannelClosed):
            await channel.send(b"more")


async def test_a_full_channel_makes_the_sender_wait() -> None:
    near, far = channel_pair(queued_messages=1)
    await near.send(b"1")
    waiting = asyncio.create_task(near.send(b"2"))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await far.receive() == b"1"
    await waiting
    assert await far.receive() == b"2"


async def test_closing_wakes_whoever_waits() -> None:
    near, far = channel_pair(queued_messages=1)
    await near.send(b"1")
    tasks = [asyncio.create_task(near.send(b"2")), asyncio.create_task(near.receive())]
    await asyncio.sleep(0)
    await far.close()
    assert all(isinstance(result, ChannelClosed) for result in await asyncio.gather(*tasks, return_exceptions=True))


async def test_a_cancelled_reader_loses_no_message() -> None:
    pipe = Pipe(4)
    reader = asyncio.create_task(pipe.get())
    await asyncio.sleep(0)
    await pipe.put(b"1")
    reader.cancel()
    await asyncio.wait({reader})
    assert await pipe.get() == b"1"


async def test_an_acceptor_serves_each_connection() -> None:
    async def accept(channel: Channel) -> None:
        while True:
            await channel.send((await channel.receive()).upper())

    transport = InProcessTransport(accept)
    channels = [await transport.connect() for _ in range(3)]
    for channel in channels:
        await channel.send(b"abc")
    assert [await channel.receive() for channel in channels] == [b"ABC"] * 3
    await channels[0].close()
    await transport.aclose()
    with pytest.raises(ChannelClosed):
        await channels[1].receive()


@pytest.mark.parametrize(("failure", "code"), [(BadFrame("no frame"), 4401), (ValueError("a bug"), 1011)])
async def test_a_failing_acceptor_closes_the_channel_with_its_failure(failure: Exception, code: int) -> None:
    async def accept(channel: Channel) -> None:
        await channel.send(b"first")
        raise failure

    channel = await InProcessTransport(accept).connect()
    assert await channel.receive() == b"first"
    with pytest.raises(ChannelClosed) as caught:
        await channel.receive()
    assert caught.value.code == code
    assert caught.value.__cause__ is failure


async def test_an_acceptor_that_returns_closes_the_channel() -> None:
    async def accept(channel: Channel) -> None:
        await channel.receive()

    channel = await InProcessTransport(accept).connect()
    await channel.send(b"x")
    with pytest.raises(ChannelClosed) as caught:
        await channel.receive()
    assert caught.value.code == 1000


def test_reasons_are_cut_between_characters() -> None:
    assert short_reason("ü" * 100) == "ü" * 61
