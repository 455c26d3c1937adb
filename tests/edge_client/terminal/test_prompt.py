"""The terminal's side of the chat: keys, completion, history, and what is shown of an answer."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from edge_client.generate import GenerationStats
from edge_client.settings import EdgeSettings
from edge_client.terminal.prompt import CommandCompleter, TerminalScreen
from edge_client.terminal.screens import PlainScreen
from edge_client.terminal.status import Totals, report, toolbar
from split_llama.errors import UsageError


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as keys:
        yield keys


def make_screen(keys: PipeInput, history: Path | None = None) -> tuple[TerminalScreen, io.StringIO]:
    answers = io.StringIO()
    return TerminalScreen(lambda: "status", history, source=keys, output=DummyOutput(), answers=answers), answers


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~pasted\nblock\nof lines\x1b[201~\r", "pasted\nblock\nof lines"),
        ('"""a\rb"""\r', '"""a\nb"""'),
        ("forget this\x03kept\r", "kept"),
        ("Wörter 猫 🐈\r", "Wörter 猫 🐈"),
        ("\x03", None),
        ("\x04", None),
    ],
)
async def test_keys(keys: PipeInput, typed: str, read: str | None) -> None:
    screen, _ = make_screen(keys)
    keys.send_text(typed)
    assert await asyncio.wait_for(screen.read(), 20) == read


async def test_up_gives_the_last_message_within_the_chat(keys: PipeInput) -> None:
    screen, _ = make_screen(keys)
    keys.send_text("first\r")
    await screen.read()
    keys.send_text("\x1b[A again\r")
    assert await asyncio.wait_for(screen.read(), 20) == "first again"


async def test_history_is_kept_in_a_file_only_when_asked_and_for_its_owner(keys: PipeInput, tmp_path: Path) -> None:
    path = tmp_path / "history"
    screen, _ = make_screen(keys, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys.send_text("remember me\r")
    await screen.read()
    assert "remember me" in path.read_text(encoding="utf-8")
    later, _ = make_screen(keys, path)
    # History is read in the background; the prompt may be up before it is there.
    keys.send_text("\x1b[A")
    reading = asyncio.ensure_future(later.read())
    await asyncio.sleep(0.2)
    keys.send_text("\x1b[A\r")
    assert await asyncio.wait_for(reading, 20) == "remember me"
    with pytest.raises(UsageError, match="cannot keep the history"):
        make_screen(keys, tmp_path / "none" / "history")


def test_answers_cannot_order_the_terminal_about(keys: PipeInput) -> None:
    screen, answers = make_screen(keys)
    screen.write("red \x1b[31mnot\x07 really\tübel 猫\n\x9b2J")
    screen.notice("two\nlines")
    screen.end_answer()
    assert answers.getvalue() == "red \ufffd[31mnot\ufffd really\tübel 猫\n\ufffd2J\n· two\n· lines\n"


async def test_ctrl_c_during_an_answer_reaches_the_chat_and_is_given_back(keys: PipeInput) -> None:
    screen, _ = make_screen(keys)
    before = signal.getsignal(signal.SIGINT)
    pressed = asyncio.Event()
    with screen.stopping(pressed.set):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(pressed.wait(), 20)
    assert signal.getsignal(signal.SIGINT) is before


def completions(text: str) -> list[str]:
    return [each.text for each in CommandCompleter().get_completions(Document(text), CompleteEvent())]


def test_completion(tmp_path: Path) -> None:
    assert completions("/s") == ["/system", "/speculate", "/stats", "/save"]
    assert completions("/speculate a") == ["auto"]
    assert completions("s") == []
    (tmp_path / "chat.json").touch()
    assert completions(f"/load {tmp_path}/ch") == ["at.json"]


class Tty(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_from_a_pipe_with_answers_on_a_terminal() -> None:
    answers, notices, piped = Tty(), io.StringIO(), io.StringIO()
    screen = PlainScreen(io.StringIO(), answers, notices)
    screen.write("a\x1b]52;c;eA==\x07\tb\n")
    screen.notice("the server says \x1b]0;title\x9c")
    assert answers.getvalue() == "a\ufffd]52;c;eA==\ufffd\tb\n"
    assert notices.getvalue() == "the server says \ufffd]0;title\ufffd\n"
    PlainScreen(io.StringIO(), piped, notices).write("a\x1b[2J\r\x00")
    assert piped.getvalue() == "a\x1b[2J\r\x00"


async def test_pipes_are_plain() -> None:
    answers, notices = io.StringIO(), io.StringIO()
    screen = PlainScreen(io.StringIO("one\ntwo"), answers, notices)
    assert [await screen.read() for _ in range(3)] == ["one\n", "two", None]
    screen.write("text")
    screen.end_answer()
    screen.notice("words")
    assert (answers.getvalue(), notices.getvalue()) == ("text\n", "words\n")
    screen = PlainScreen(io.TextIOWrapper(io.BytesIO(b"\xff\xff\n"), encoding="utf-8"), answers, notices)
    with pytest.raises(UsageError, match="no text in utf-8"):
        await screen.read()


def test_status_and_stats() -> None:
    settings = EdgeSettings(server="http://x", noise="0.02")
    totals = Totals()
    assert toolbar(settings, "demo", totals) == (
        " demo · partition 1,1 · noise 0.02 · 0 round trips · 0 bytes sent · /help "
    )
    assert report(totals, 0) == "nothing was asked yet"
    stats = GenerationStats(
        prompt_tokens=9,
        cached_tokens=5,
        round_trips=3,
        ttft_ms=12,
        itl_ms=[10.0, 0, 30.0, 0],
        bytes_up=1500,
        rows_up=12,
    )
    stats.drafted, stats.accepted = 8, 2
    totals.add(stats, 5)
    assert "100.0 tokens/s · 3 round trips · 1,500 bytes sent" in toolbar(settings, "demo", totals)
    shown = report(totals, 11)
    for words in ("5 of them the server had already", "8 tokens guessed, 2 of them right (25%)", "11 distinct noised"):
        assert words in shown
