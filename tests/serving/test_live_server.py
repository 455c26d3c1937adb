"""A real server process: sockets, signals, uvicorn's limits, and how fast it is there."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from raw_edge import Floats, RawEdge
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import ConnectionClosed

from split_llama.errors import BadFrame, ServerUnreachable, Unauthenticated
from split_llama.transport.base import ChannelClosed
from split_llama.transport.http import HttpTransport
from split_llama.transport.websocket import WebSocketTransport
from split_llama.wire.control import Grant
from split_llama.wire.frame import Frame, Kind

BLOCKS = (1, 5)
KEY = "a-key-of-the-tests"
Whole = Callable[..., Floats]


class Server:
    """A split-server process; `url` is known once it listens."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CONFIG_HOME": "/nonexistent", "FL_LLAMA_SERVER_DEVICE": "cpu", **(env or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, word: str) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if word in line:
                    return line
            if self.process.poll() is not None:
                self._reader.join(1)
                break
            time.sleep(0.01)
        raise AssertionError(f"no line with {word!r}: {self.lines}")

    def ready(self) -> Server:
        match = re.search(r"url=(\S+)", self.wait_for(" ready "))
        assert match
        self.url = match[1]
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        self._reader.join(2)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    running = Server(str(model_folder), "--port", "0", "--api-key", KEY).ready()
    yield running
    assert running.stop() == 0
    # Whatever the tests did to it, it is not worth more than a line at level info.
    assert not [line for line in running.lines if " INFO " not in line]


def same(got: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


async def test_a_session_over_websocket(server: Server, states: Floats, whole: Whole) -> None:
    edge = await RawEdge.greet(await WebSocketTransport(server.url, KEY).connect())
    session = await edge.open(1, BLOCKS)
    got = [await session.run(0, states[:30])]
    got += [await session.run(i, states[i : i + 1]) for i in range(30, 40)]
    same(np.concatenate(got), whole(states[:40]))
    await session.close()
    await edge.channel.close()


async def test_a_session_over_post(server: Server, states: Floats, whole: Whole) -> None:
    edge = await RawEdge.greet(await HttpTransport(server.url, KEY, poll_seconds=0.05).connect())
    session = await edge.open(1, BLOCKS)
    await edge.send(*(session.step(a, states[a : a + 10]) for a in range(0, 60, 10)))
    same(np.concatenate([await session.reply() for _ in range(6)]), whole(states[:60]))
    # The same session over another kind of link.
    other = await RawEdge.greet(await WebSocketTransport(server.url, KEY).connect())
    answer = await session.attach(other)
    assert Grant.from_bytes(answer.payload).length == 60
    same(await session.run(60, states[60:62]), whole(states[:62])[60:])
    await session.close()
    await edge.channel.close()
    await other.channel.close()


async def test_fatal_errors_over_both_links(server: Server) -> None:
    edge = await RawEdge.greet(await WebSocketTransport(server.url, KEY).connect())
    await edge.channel.send(b"nonsense that is no frame at all, but long enough")
    assert isinstance(await edge.error(0), BadFrame)
    with pytest.raises(ChannelClosed) as closed:
        await edge.next()
    assert closed.value.code == BadFrame.close_code
    edge = await RawEdge.greet(await HttpTransport(server.url, KEY, poll_seconds=0.05).connect())
    await edge.channel.send(b"nonsense that is no frame at all, but long enough")
    with pytest.raises(ChannelClosed) as closed:
        await edge.next()
    assert isinstance(closed.value.error(), BadFrame)
    await edge.channel.close()


async def test_text_and_oversized_messages_close_the_connection(server: Server) -> None:
    address = server.url.replace("http", "ws") + "/v1/stream"
    headers = {"Authorization": f"Bearer {KEY}"}
    async with ws_connect(address, additional_headers=headers, compression="deflate") as socket:
        assert not socket.response.headers.get("Sec-WebSocket-Extensions"), "permessage-deflate must stay off"
        await socket.send("hello?")
        frame = Frame.decode(await socket.recv(), 1 << 20)
        assert frame.kind is Kind.ERROR
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == BadFrame.close_code
    async with ws_connect(address, additional_headers=headers) as socket:
        with suppress(ConnectionClosed):
            await socket.send(bytes(3 * 2**20))
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_no_key_no_service(server: Server, key: str | None) -> None:
    for transport in (WebSocketTransport(server.url, key), HttpTransport(server.url, key)):
        with pytest.raises(Unauthenticated):
            await transport.connect()
    async with httpx.AsyncClient(base_url=server.url) as client:
        for path in ("/v1/models", "/v1/model", "/v1/model/edge?p=1&q=1", "/v1/sessions", "/v1/key"):
            response = await client.get(path, headers={"Authorization": f"Bearer {key}"} if key else {})
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "Unauthenticated"
        for path in ("/health", "/healthz", "/readyz", "/version", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


async def test_an_orderly_end_finishes_what_is_queued(model_folder: Path, states: Floats, whole: Whole) -> None:
    server = await asyncio.to_thread(lambda: Server(str(model_folder), "--port", "0").ready())
    edge = await RawEdge.greet(await WebSocketTransport(server.url).connect())
    session = await edge.open(1, BLOCKS)
    await edge.send(*(session.step(i, states[i : i + 1]) for i in range(60)))
    first = await session.reply()
    server.process.send_signal(signal.SIGTERM)
    rest = [await session.reply() for _ in range(59)]
    same(np.concatenate([first, *rest]), whole(states[:60]))
    with pytest.raises(ChannelClosed) as closed:
        await edge.next()
    assert closed.value.code == 1001
    assert await asyncio.to_thread(server.process.wait, 10) == 0
    await edge.channel.close()
    with pytest.raises(ServerUnreachable):
        await WebSocketTransport(server.url).connect()
    log = "".join(server.lines)
    assert session.payload.session not in log
    assert session.payload.secret not in log
    server.stop()


def test_a_second_signal_ends_at_once(model_folder: Path) -> None:
    server = Server(str(model_folder), "--port", "0").ready()
    server.process.send_signal(signal.SIGSTOP)
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGCONT)
    assert server.process.wait(5) == 130
    server.stop()


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A CA, and a server's and a client's certificate signed by it, as NAME.pem and NAME.key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2")
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return tmp_path


async def test_tls_with_client_certificates(
    model_folder: Path, certificates: Path, states: Floats, whole: Whole
) -> None:
    files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certs": "ca.pem"}
    flags = [text for flag, file in files.items() for text in (f"--ssl-{flag}", str(certificates / file))]
    server = await asyncio.to_thread(lambda: Server(str(model_folder), "--port", "0", *flags).ready())
    assert server.url.startswith("https://")
    known = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with pytest.raises(ServerUnreachable):
        await RawEdge.greet(await WebSocketTransport(server.url, ssl=known).connect())
    known.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    edge = await RawEdge.greet(await WebSocketTransport(server.url, ssl=known).connect())
    session = await edge.open(1, BLOCKS)
    same(await session.run(0, states[:5]), whole(states[:5]))
    await edge.channel.close()
    with pytest.raises(ServerUnreachable, match="certificate"):
        await WebSocketTransport(server.url).connect()
    assert await asyncio.to_thread(server.stop) == 0
