"""Processes that end with the block that started them, in every case, each with a log file of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_client.printable import printable
from edge_client.state_files import cache_errors

# A server lets go of its clients within this time, a client writes where it stands.
GRACE_SECONDS = 15.0
LOG_TAIL_BYTES = 4000
LOG_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Child:
    """A process under a name, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def code(self) -> int | None:
        """The exit code, `None` while it runs."""
        return self.process.poll()

    def last_words(self) -> str:
        """Give the end of its log."""
        with contextlib.suppress(OSError), self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            return "\n".join(f"  {printable(line)}" for line in lines)
        return "  (no log)"


class Children:
    """Use as a context: whatever was started in it has ended when it is left."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(
        self, name: str, module: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> Child:
        """Start `python -m module`. Raises `CacheError` where its log cannot be written."""
        with cache_errors("write the log"):
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = log.open("ab")
        with stream:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **(environ or {})},
                # Ctrl-C in the terminal is for the parent, which ends the others in order.
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def started(self, name: str) -> Child:
        """Give the one of this name."""
        return next(child for child in self._children if child.name == name)

    def end(self) -> None:
        """End all that still run: politely, then not."""
        with _undisturbed():
            for child in reversed(self._children):
                if child.code is None:
                    child.process.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            for child in self._children:
                try:
                    child.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.process.kill()
                    child.process.wait()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no second Ctrl-C, and no SIGTERM, keep processes alive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
