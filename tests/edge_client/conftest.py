"""A real server in the test's own event loop, and one as a process that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from edge_client.settings import EdgeSettings
from serving.core import Core
from serving.hosted import load_hosted
from serving.keys import KeyRing
from serving.run import make_config
from serving.settings import ServerSettings

ServeModel = Callable[..., AbstractAsyncContextManager[str]]
MakeSettings = Callable[..., EdgeSettings]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def edge_settings(tmp_path: Path) -> MakeSettings:
    """Make settings whose cache and state live in the test's folder; noise off unless asked for."""

    def make(url: str, **changes: Any) -> EdgeSettings:
        given = {"noise": "0", "codec": "fp32", "device": "cpu", "threads": 1, "speculate": "off"} | changes
        return EdgeSettings(server=url, cache_dir=tmp_path / "cache", state_dir=tmp_path / "state", **given)

    return make


@pytest.fixture
def serve_model() -> ServeModel:
    """Serve a model folder in this event loop: `async with serve_model(folder) as url`."""
    return _serve_model


@contextlib.asynccontextmanager
async def _serve_model(folder: Path, **changes: Any) -> AsyncIterator[str]:
    given = {"model": str(folder), "device": "cpu", "dtype": "float32", "allowed_partitions": "0,0"} | changes
    settings = ServerSettings(**given)
    core = Core(settings, KeyRing(None, None))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(make_config(core))
        server.install_signal_handlers = lambda: None
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        core.serve(await asyncio.to_thread(load_hosted, settings, folder))
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            core.closing.set()
            server.should_exit = True
            await serving
            await core.aclose()


class ServerProcess:
    """`split-server` as a process on a port of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as bound:
            self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable,
            "-m",
            "serving.cli",
            str(folder),
            "--port",
            str(self.port),
            "--dtype",
            "float32",
        ]
        self._command += flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while wait and not self._is_ready():
            assert self._process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """As by kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """As by Ctrl-C: the server ends in order."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    def sessions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/v1/sessions", timeout=5).json()["data"]
        return found


@pytest.fixture
def server_process() -> Iterator[Callable[..., ServerProcess]]:
    """Make servers as processes; they are killed at the end."""
    made: list[ServerProcess] = []

    def make(folder: Path, *flags: str) -> ServerProcess:
        made.append(ServerProcess(folder, *flags))
        return made[-1]

    yield make
    for process in made:
        process.kill()
