"""The chat in a terminal: prompt_toolkit reads, answers are written straight to the terminal's own scrollback."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from edge_client.printable import printable
from edge_client.terminal.commands import COMMANDS, is_open_quote
from split_llama.errors import UsageError

PROMPT, CONTINUATION = "> ", "  "


class TerminalScreen:
    """Somebody at a terminal. `status` gives the line at the bottom; `history` is a file for messages, if wanted.

    `source` and `output` replace the terminal's input and the prompt's output, `answers` where answers go.
    """

    is_interactive = True

    def __init__(
        self,
        status: Callable[[], str],
        history: Path | None = None,
        *,
        source: Input | None = None,
        output: Output | None = None,
        answers: TextIO | None = None,
    ) -> None:
        self._answers = answers or sys.stdout
        self._at_line_start = True
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=_history(history),
            completer=CommandCompleter(),
            complete_while_typing=Condition(_is_command),
            key_bindings=_bindings(),
            bottom_toolbar=status,
            reserve_space_for_menu=4,
            input=source,
            output=output,
        )

    async def read(self) -> str | None:
        """Ask for a message; Ctrl-D and Ctrl-C at an empty prompt end the chat."""
        try:
            return await self._session.prompt_async(handle_sigint=False)
        except (EOFError, KeyboardInterrupt):
            return None

    def write(self, text: str) -> None:
        """Show a piece of an answer."""
        if text:
            self._put(printable(text))

    def notice(self, text: str) -> None:
        """Show lines with a mark before them."""
        self.end_answer()
        self._put("".join(f"· {line}\n" for line in printable(text).splitlines()))

    def end_answer(self) -> None:
        """Begin a new line unless there is one."""
        if not self._at_line_start:
            self._put("\n")

    @contextlib.contextmanager
    def stopping(self, press: Callable[[], object]) -> Iterator[None]:
        """Take SIGINT, which a terminal sends for Ctrl-C, and keep what is typed meanwhile from showing."""
        loop = asyncio.get_running_loop()
        before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(press))
        try:
            with _no_echo():
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _put(self, text: str) -> None:
        self._answers.write(text)
        self._answers.flush()
        self._at_line_start = text.endswith("\n")


class CommandCompleter(Completer):
    """Completes commands and what they take."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Give what may stand at the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        word, space, argument = text.partition(" ")
        if not space:
            for command in COMMANDS:
                if f"/{command.name}".startswith(word):
                    yield Completion(f"/{command.name}", -len(word), display_meta=command.purpose)
        elif word == "/speculate":
            yield from (Completion(way, -len(argument)) for way in ("auto", "off") if way.startswith(argument))
        elif word in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)


def _is_command() -> bool:
    return get_app().current_buffer.text.startswith("/")


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None
        elif is_open_quote(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return bindings


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8"):
            return FileHistory(path)
    except OSError as error:
        raise UsageError(f"cannot keep the history in {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Keep typed keys from showing between the words of an answer; they are read by the next prompt."""
    attributes = _terminal_attributes()
    if attributes is None:
        yield
        return
    import termios

    quiet = list(attributes)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, attributes)


def _terminal_attributes() -> list[Any] | None:
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios.tcgetattr(0)
    except (termios.error, OSError):
        return None
