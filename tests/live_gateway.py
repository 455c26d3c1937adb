"""A real `edge-client serve` process on loopback, for tests that want the whole road."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
from live_server import READY_SECONDS, free_port


@contextlib.contextmanager
def live_gateway(*flags: str) -> Iterator[str]:
    """Run a gateway for the block; give its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "edge_client", "serve", "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _is_up(url):
            assert process.poll() is None, "the gateway ended before it was ready"
            assert time.monotonic() < deadline, f"the gateway was not ready within {READY_SECONDS} s"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
