"""A split-server of one's own, started as a process for the time of an evaluation."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from split_llama.errors import ServerFault

READY = "ready url="
LAST_LINES = 20
END_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Where it listens, and the key that opens it."""

    url: str
    api_key: str


@contextlib.contextmanager
def local_server(flags: Sequence[str]) -> Iterator[LocalServer]:
    """Run `split-server FLAGS` on a free port of this machine for a block, with a key that only this process knows.

    Raises `ServerFault` with the server's own last words when it does not come up.
    """
    key = secrets.token_hex(24)
    command = [sys.executable, "-m", "serving.cli", *flags]
    # The log is how it says where it listens.
    command += ["--host", "127.0.0.1", "--port", "0", "--log-level", "info"]
    # A key on the command line could be read by everybody on this machine.
    environment = os.environ | {"FL_LLAMA_SERVER_API_KEY": key}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        log = _Log(process)
        try:
            yield LocalServer(log.wait_until_ready(), key)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            log.join()


class _Log:
    """Reads the server's log in a thread: a full pipe would stop the server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._told = threading.Event()
        self._url = ""
        self._thread = threading.Thread(target=self._read, name="server log", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> str:
        """Give the server's address as soon as it serves; loading may take as long as it takes."""
        self._told.wait()
        if not self._url:
            said = "\n".join(self._last) or "nothing"
            raise ServerFault(f"the split-server ended before it was ready (it said: {said})")
        return self._url

    def join(self) -> None:
        """Wait for the end of the log."""
        self._thread.join()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last.append(line.rstrip())
            if READY in line:
                self._url = line.split(READY, 1)[1].strip()
                self._told.set()
        self._told.set()
