"""A real split-server process on loopback, for tests that want the whole road."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

READY_SECONDS = 90.0


def free_port() -> int:
    """Find a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(model: Path | str, port: int, *flags: str) -> subprocess.Popen[bytes]:
    """Start `split-server MODEL` and wait until it is ready."""
    fixed = ["--port", str(port), "--threads", "1", "--log-level", "warning"]
    process = subprocess.Popen([sys.executable, "-m", "serving.cli", str(model), *fixed, *flags])
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it was ready"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                return process
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise AssertionError(f"the server was not ready within {READY_SECONDS} s")


@contextlib.contextmanager
def live_server(model: Path | str, *flags: str) -> Iterator[str]:
    """Run a server for the block; give its URL."""
    port = free_port()
    process = start_server(model, port, *flags)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)
