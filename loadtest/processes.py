"""The parent's side of the edge processes: start them, let them go at once, hear what they say, end them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from typing import Any, Protocol

from loadtest.records import Record, decode_line, encode_line
from loadtest.settings import LoadSettings
from split_llama.errors import FlLlamaError, error_for_code

# A record holds one number per token.
LONGEST_LINE = 1 << 26
LAST_WORD_SECONDS = 10.0
WORKER = (sys.executable, "-m", "loadtest.worker")


class Listener(Protocol):
    """Who hears what the processes report."""

    def started(self) -> None:
        """A request was started."""

    def ended(self, record: Record) -> None:
        """A request ended."""

    def problem(self, text: str) -> None:
        """A process failed after measuring began."""


class EdgeProcesses:
    """All edge processes of a run. Use as `async with EdgeProcesses(...) as edges`; none outlives the block."""

    def __init__(self, settings: LoadSettings, listener: Listener, notify: Callable[[str], None]) -> None:
        self._settings = settings
        self._listener = listener
        self._notify = notify
        self._processes: list[Process] = []
        self._readers: list[asyncio.Task[None]] = []
        self._ready: list[asyncio.Future[None]] = []

    async def __aenter__(self) -> EdgeProcesses:
        loop = asyncio.get_running_loop()
        for number in range(self._settings.processes):
            process = await asyncio.create_subprocess_exec(*WORKER, stdin=PIPE, stdout=PIPE, limit=LONGEST_LINE)
            self._processes.append(process)
            self._ready.append(loop.create_future())
            self._tell(process, encode_line("job", process=number, settings=self._settings.to_json()))
            self._readers.append(asyncio.create_task(self._read(number), name=f"edge-process-{number}"))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for process, reader in zip(self._processes, self._readers, strict=True):
            # A reader that ended by itself has seen its process end.
            if not reader.done() or reader.cancelled() or reader.exception() is not None:
                _kill(process)
        await asyncio.gather(*(process.wait() for process in self._processes), *self._readers, return_exceptions=True)
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for future in self._ready:
            # Only the first failure is raised; the others count as heard.
            if not future.cancel() and not future.cancelled():
                future.exception()

    async def wait_ready(self) -> None:
        """Wait until every process is connected and warm. Raises what went wrong in the first that is not."""
        await asyncio.gather(*self._ready)

    def go(self) -> None:
        """Begin the measured part everywhere."""
        for process in self._processes:
            self._tell(process, encode_line("go"))

    async def wait_done(self) -> None:
        """Wait until every process has done its share."""
        await asyncio.gather(*(asyncio.shield(reader) for reader in self._readers))

    async def stop(self) -> None:
        """Break off what is running; each process still reports it, or is killed if it takes too long."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_SECONDS):
                await asyncio.gather(*(asyncio.shield(reader) for reader in self._readers), return_exceptions=True)

    def _tell(self, process: Process, line: bytes) -> None:
        assert process.stdin is not None
        # One that died is heard of by its reader.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)

    async def _read(self, number: int) -> None:
        """Pass on what a process says until it is done."""
        process, ready = self._processes[number], self._ready[number]
        try:
            failure = await self._follow(number)
        except ValueError as error:
            _kill(process)
            failure = FlLlamaError(f"edge process {number} said what is no event: {error}")
        # Reaped here and nowhere else: a kill after the end would take the exit code from asyncio.
        await process.wait()
        if failure is not None and not ready.done():
            ready.set_exception(failure)
        elif failure is not None:
            self._listener.problem(failure.message)
        elif not ready.done():
            ready.cancel()

    async def _follow(self, number: int) -> FlLlamaError | None:
        """Pass on events up to the end; give what went wrong. Raises `ValueError` for anything but events."""
        process = self._processes[number]
        assert process.stdout is not None
        failure: FlLlamaError | None = None
        done = False
        async for line in process.stdout:
            event = decode_line(line)
            if event["event"] == "done":
                done = True
            elif event["event"] == "error":
                failure = _error(number, event)
            else:
                self._hear(number, event)
        if not done and failure is None:
            failure = FlLlamaError(f"edge process {number} ended with exit code {await process.wait()}")
        return failure

    def _hear(self, number: int, event: dict[str, Any]) -> None:
        match event["event"]:
            case "started":
                self._listener.started()
            case "ended":
                self._listener.ended(Record.from_json(event["record"]))
            case "ready":
                if not self._ready[number].done():
                    self._ready[number].set_result(None)
            case "note" if number == 0:
                self._notify(event["text"])


def _error(number: int, event: dict[str, Any]) -> FlLlamaError:
    if event["code"]:
        return error_for_code(event["code"], event["message"])
    return FlLlamaError(f"edge process {number} failed: {event['message']}")


def _kill(process: asyncio.subprocess.Process) -> None:
    # It may have ended between the decision and the signal.
    with contextlib.suppress(ProcessLookupError):
        process.kill()
