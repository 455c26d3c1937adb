"""A real server process."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from protocol_page.wire import PATIENCE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One `split-server` at a port of its own; it can be killed and started again there."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.port = free_port()
        self._folder, self._log = folder, log
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "serving.cli", str(self._folder), "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--threads", "1", "--log-level", "warning"], stdout=log, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 2 * PATIENCE
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                pytest.fail(f"the server did not start: {self._log.read_text()}")
            time.sleep(0.05)

    def _ready(self) -> bool:
        ask = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            ask.request("GET", "/readyz")
            return ask.getresponse().status == 200
        except OSError:
            return False
        finally:
            ask.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
