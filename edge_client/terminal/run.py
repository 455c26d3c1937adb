"""From settings to a running chat."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_client.answer import describe_noise, progress_bar
from edge_client.printable import printable
from edge_client.rest import ModelCard
from edge_client.runtime import prepare
from edge_client.settings import EdgeSettings
from edge_client.terminal.chat import Chat
from edge_client.terminal.connection import Connection
from edge_client.terminal.screens import PlainScreen, Screen
from edge_client.terminal.status import Totals, toolbar
from edge_client.threads import in_thread
from split_llama.errors import UsageError


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What `edge-client chat` takes besides the settings."""

    system: str | None = None
    history: Path | None = None


def run_chat(settings: EdgeSettings, options: ChatOptions, card: ModelCard) -> None:
    """Chat until the user leaves or stdin ends. Raises `FlLlamaError`."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if options.history is not None and not is_terminal:
        raise UsageError("--history is for a chat in a terminal; here lines are read from a pipe")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    asyncio.run(_chat(settings, options, card, is_terminal))


async def _chat(settings: EdgeSettings, options: ChatOptions, card: ModelCard, is_terminal: bool) -> None:
    totals = Totals()
    with progress_bar(quiet=False) as progress:
        source = await in_thread(lambda: prepare(settings, card=card, progress=progress, notify=_say))
    connection = Connection(settings, source, lambda line: screen.notice(line), lambda _present, _total: None)

    def status() -> str:
        # --partition auto is a wish; the source has what came of it.
        pair = connection.source.partition
        return toolbar(replace(connection.settings, partition=f"{pair.p},{pair.q}"), source.card.id, totals)

    screen: Screen = _terminal(status, options) if is_terminal else PlainScreen()
    try:
        edge = await connection.edge()
        _greet(screen, connection, options)
        screen.notice(describe_noise(settings, edge.noise))
        await Chat(connection, screen, totals, options.system).run()
    finally:
        await connection.drop()


def _terminal(status: Callable[[], str], options: ChatOptions) -> Screen:
    from edge_client.terminal.prompt import TerminalScreen

    return TerminalScreen(status, options.history)


def _greet(screen: Screen, connection: Connection, options: ChatOptions) -> None:
    if not screen.is_interactive:
        return
    screen.notice(f"{connection.source.card.id} at {connection.settings.server_url()}; /help lists what can be done")
    if options.history is not None:
        screen.notice(f"every message is kept as it is in {options.history}; without --history nothing is kept")


def _say(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")
