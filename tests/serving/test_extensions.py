"""The seat of an extension: found, given a host, told of clients; and nothing changes for those who have none."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from fastapi import APIRouter

from serving.connection import OUTGOING_BYTES
from serving.core import Core
from serving.extensions import CoreHost, Extensions
from serving.keys import KeyRing
from serving.settings import ServerSettings
from split_llama.config import BlockRange
from split_llama.errors import BadRequest, ModelMismatch, PartitionNotAllowed, SlowReader, UnknownSession, UsageError
from split_llama.extension import Send
from split_llama.load import load_segment
from split_llama.transport.base import ChannelClosed
from split_llama.wire.frame import Frame, Kind


class Echo:
    """An extension whose guests send everything back, computed in the engine's thread."""

    name = "echo"

    def __init__(self, host: CoreHost | None = None) -> None:
        self.host = host
        self.guests: list[EchoGuest] = []

    def router(self) -> Any:
        router = APIRouter()

        @router.get("/v1/echo")
        async def echo() -> dict[str, int]:
            return {"guests": len(self.guests)}

        return router

    def join(self, frame: Frame, owner: str, send: Send) -> EchoGuest:
        if bytes(frame.payload) == b"no":
            raise BadRequest("no place for you")
        guest = EchoGuest(self, owner, send)
        self.guests.append(guest)
        send(Frame(Kind.JOIN, payload=owner.encode()))
        return guest

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


class EchoGuest:
    def __init__(self, extension: Echo, owner: str, send: Send) -> None:
        self.extension, self.owner, self.send = extension, owner, send
        self.events: list[str] = []
        self.is_busy = False
        self.over = asyncio.Event()

    def receive(self, frame: Frame) -> None:
        if frame.kind is not Kind.FORWARD:
            raise BadRequest(f"{frame.kind.name} is not for me")
        payload = bytes(frame.payload)
        self.task = asyncio.create_task(self._answer(frame.seq, payload))

    async def _answer(self, seq: int, payload: bytes) -> None:
        def work() -> Generator[None, None, bytes]:
            yield
            return payload[::-1]

        host = self.extension.host
        assert host is not None
        self.send(Frame(Kind.FORWARD, seq=seq, payload=await host.compute(work())))

    def leave(self) -> None:
        self.events.append("left")

    def detach(self) -> None:
        self.events.append("detached")
        self.over.set()


@pytest.fixture
async def echo(place: Any) -> Echo:
    extension = Echo(CoreHost(place.core, "echo"))
    place.core.extensions = Extensions([extension])
    return extension


async def test_frames_of_a_joined_handle_go_to_the_guest(place: Any, echo: Echo) -> None:
    edge = await place.connect(owner="alice")
    await edge.send(Frame(Kind.JOIN, handle=5))
    assert bytes((await edge.expect(Kind.JOIN, 5)).payload) == b"alice"
    await edge.send(Frame(Kind.FORWARD, handle=5, seq=9, payload=b"abc"))
    answer = await edge.expect(Kind.FORWARD, 5)
    assert (answer.seq, bytes(answer.payload)) == (9, b"cba")


async def test_refusals_name_the_message_and_the_connection_lives(place: Any, echo: Echo) -> None:
    edge = await place.connect()
    await edge.send(Frame(Kind.JOIN, handle=5, payload=b"no"))
    assert isinstance(await edge.error(5, 0), BadRequest)
    await edge.send(Frame(Kind.JOIN, handle=5))
    await edge.expect(Kind.JOIN, 5)
    await edge.send(Frame(Kind.BACKWARD, handle=5, seq=3))
    assert "BACKWARD is not for me" in (await edge.error(5, 3)).message
    await edge.send(Frame(Kind.JOIN, handle=5))
    assert "JOIN is not for me" in (await edge.error(5, 0)).message
    await edge.send(Frame(Kind.FORWARD, handle=6, seq=1))
    assert isinstance(await edge.error(6, 1), UnknownSession)


async def test_leaving_and_losing_the_connection_are_told_apart(place: Any, echo: Echo) -> None:
    edge = await place.connect()
    await edge.send(Frame(Kind.JOIN, handle=5), Frame(Kind.JOIN, handle=6), Frame(Kind.CLOSE, handle=5))
    await edge.expect(Kind.JOIN, 5)
    await edge.expect(Kind.JOIN, 6)
    await edge.expect(Kind.CLOSE, 5)
    await edge.channel.close()
    async with asyncio.timeout(5):
        await echo.guests[1].over.wait()
    assert [guest.events for guest in echo.guests] == [["left"], ["detached"]]
    # Answers that come too late go nowhere.
    echo.guests[0].send(Frame(Kind.FORWARD))
    echo.guests[1].send(Frame(Kind.FORWARD))


async def test_an_answer_larger_than_any_backlog_arrives_and_is_overtaken(place: Any, echo: Echo) -> None:
    edge, made = await place.connect(), []
    await edge.send(Frame(Kind.JOIN, handle=5))
    await edge.expect(Kind.JOIN, 5)
    frames = OUTGOING_BYTES // 60_000 + 100

    def answer() -> Iterator[Frame]:
        for number in range(frames):
            made.append(number)
            yield Frame(Kind.FORWARD, seq=9, first=number, payload=bytes(60_000))

    echo.guests[0].send(answer())
    echo.guests[0].send(Frame(Kind.REPLY, seq=10))
    for number in range(100):
        assert (await edge.expect(Kind.FORWARD, 5)).first == number
    assert len(made) < frames, "nothing is cut before it can be sent"
    # Somebody else's answer on the same connection does not wait for the rest.
    await edge.send(Frame(Kind.CANCEL, handle=6))
    seen = []
    while len(seen) < frames - 100:
        frame = await edge.next()
        seen.append(frame.kind)
    assert seen.index(Kind.ERROR) < len(seen) - 1
    assert (await edge.expect(Kind.FORWARD, 5)).first == frames - 1
    assert (await edge.expect(Kind.REPLY, 5)).seq == 10


async def test_whoever_leaves_is_not_told_the_rest(place: Any, echo: Echo) -> None:
    edge = await place.connect()
    await edge.send(Frame(Kind.JOIN, handle=5))
    await edge.expect(Kind.JOIN, 5)
    echo.guests[0].send(Frame(Kind.FORWARD, payload=bytes(60_000)) for _ in range(2000))
    await edge.expect(Kind.FORWARD, 5)
    await edge.send(Frame(Kind.CLOSE, handle=5), Frame(Kind.JOIN, handle=5))
    seen = [await edge.next()]
    while seen[-1].kind is not Kind.JOIN:
        seen.append(await edge.next())
    assert [frame.kind for frame in seen[-2:]] == [Kind.CLOSE, Kind.JOIN]
    assert len(seen) < 1000


async def test_a_message_that_cannot_be_given_ends_the_connection(place: Any, echo: Echo) -> None:
    edge = await place.connect()
    await edge.send(Frame(Kind.JOIN, handle=5))
    await edge.expect(Kind.JOIN, 5)

    def never() -> Iterator[Frame]:
        raise SlowReader("too far behind")
        yield

    echo.guests[0].send(never())
    with pytest.raises(ChannelClosed) as closed:
        await edge.next()
    assert closed.value.code == SlowReader.close_code
    async with asyncio.timeout(5):
        await echo.guests[0].over.wait()


async def test_a_server_without_extensions_says_how_to_get_one(place: Any) -> None:
    edge = await place.connect()
    await edge.send(Frame(Kind.JOIN, handle=5))
    assert "--extension training" in (await edge.error(5)).message


def test_an_unknown_extension_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'training'"):
        Core(ServerSettings(extension=("trainin",)), KeyRing())


async def test_the_host_checks_a_clients_model(place: Any) -> None:
    host = CoreHost(place.core, "echo")
    await host.check_model(BlockRange(1, 5), place.hosted.geometry, None, None)
    with pytest.raises(ModelMismatch, match="geometry"):
        await host.check_model(BlockRange(1, 5), "0" * 64, None, None)
    with pytest.raises(ModelMismatch, match="tokenizer"):
        await host.check_model(BlockRange(1, 5), None, None, "0" * 64)
    with pytest.raises(PartitionNotAllowed):
        await host.check_model(BlockRange(0, 5), None, None, None)


async def test_dense_weights_are_loaded_once_and_are_the_checkpoints(place: Any) -> None:
    host = CoreHost(place.core, "echo")
    segment = host.dense_segment(torch.float32)
    assert host.dense_segment(torch.float32) is segment
    own = load_segment(host.checkpoint, segment.blocks, dtype=torch.float32, device=torch.device("cpu"))
    stored = dict(own.stored_parts())
    assert all(torch.equal(view, stored[name]) for name, view in segment.stored_parts())
    assert host.dense_segment(torch.bfloat16).dtype == torch.bfloat16


async def test_dense_weights_are_of_the_type_asked_for_whatever_inference_stores(make_place: Any) -> None:
    place = await make_place(dtype="float16")
    segment = CoreHost(place.core, "echo").dense_segment(torch.float32)
    assert segment.dtype == torch.float32
    assert {view.dtype for _, view in segment.stored_parts()} == {torch.float32}
