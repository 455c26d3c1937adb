"""Where the chat reads and writes: the protocol, and the plain one for pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TextIO

from edge_client.printable import for_stream, printable
from edge_client.threads import in_thread
from split_llama.errors import UsageError


class Screen(Protocol):
    """Reads messages, shows answers and notices."""

    @property
    def is_interactive(self) -> bool:
        """Whether somebody sits there: then an error is told and the chat goes on, else it ends the chat."""
        ...

    async def read(self) -> str | None:
        """Wait for a message or a command; None when there will be no more. Raises `UsageError`."""
        ...

    def write(self, text: str) -> None:
        """Show a piece of an answer."""
        ...

    def notice(self, text: str) -> None:
        """Say something that is no answer, on lines of its own."""
        ...

    def end_answer(self) -> None:
        """Whatever comes next begins a new line."""
        ...

    def stopping(self, press: Callable[[], object]) -> AbstractContextManager[None]:
        """While the block runs, Ctrl-C calls `press`, in the event loop."""
        ...


class PlainScreen:
    """A line is a message, answers go to stdout, everything else to stderr; no escape codes. Ctrl-C ends the chat.

    Answers are written as they are, but for control characters where a terminal would obey them.
    """

    is_interactive = False

    def __init__(self, source: TextIO | None = None, answers: TextIO | None = None, notices: TextIO | None = None):
        self._source = source or sys.stdin
        self._answers = answers or sys.stdout
        self._notices = notices or sys.stderr

    async def read(self) -> str | None:
        """Read one line."""
        try:
            line = await in_thread(self._source.readline)
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is no text in {self._source.encoding}: {error}") from error
        return line if line else None

    def write(self, text: str) -> None:
        """Write at once: whoever reads may wait for it."""
        self._answers.write(for_stream(text, self._answers))
        self._answers.flush()

    def notice(self, text: str) -> None:
        """Write to stderr."""
        self._notices.write(printable(text) + "\n")
        self._notices.flush()

    def end_answer(self) -> None:
        """End the line."""
        self.write("\n")

    def stopping(self, press: Callable[[], object]) -> AbstractContextManager[None]:
        """Leave Ctrl-C as it is."""
        return contextlib.nullcontext()
