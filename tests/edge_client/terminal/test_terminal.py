"""`edge-client chat` as a process: in a pseudo terminal with keys, and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import live_server
from tiny_models import TinyModel, write_model

SECONDS = 60.0
# Bracketed paste is switched on and off.
PROMPT_BEGINS, PROMPT_ENDS = b"\x1b[?2004h", b"\x1b[?2004l"
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()].|[=>78])")
# The chat gets the pseudo terminal for its own, so that Ctrl-C in it becomes SIGINT as in a real one.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'edge_client', *sys.argv[1:]])"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_model(tmp_path_factory.mktemp("terminal") / "tiny", TinyModel(max_positions=4096))
    with live_server(folder, "--dtype", "float32", "--allowed-partitions", "0,0") as url:
        yield url


def flags(url: str, tmp_path: Path) -> list[str]:
    folders = ["--cache-dir", str(tmp_path / "cache"), "--state-dir", str(tmp_path / "state")]
    return ["chat", "--server", url, "--noise", "0", "--threads", "1", *folders]


class Terminal:
    """A user before a terminal in which the chat runs."""

    def __init__(self, arguments: list[str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        command = [sys.executable, "-c", OWN_TERMINAL, *arguments]
        environment = os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        environment.pop("NO_COLOR", None)
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def type_at_prompt(self, text: str) -> None:
        """Type when the prompt is up: before that Ctrl-D is the terminal's own."""
        self._wait(lambda: self.seen.count(PROMPT_BEGINS) > self.seen.count(PROMPT_ENDS), "a prompt")
        self.type(text)

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.seen.decode(errors="replace"))

    def wait_for(self, words: str, *, after: int = 0) -> int:
        """Wait until `words` are shown behind the first `after` characters; give where they end."""
        self._wait(lambda: words in self.text[after:], words)
        return self.text.find(words, after) + len(words)

    def send(self, message: str, *, answer: int) -> None:
        """Type a message and wait until so many characters of its answer are there."""
        prompts = self.seen.count(PROMPT_ENDS)
        self.type_at_prompt(f"{message}\r")
        self._wait(lambda: self.seen.count(PROMPT_ENDS) > prompts, "the end of the prompt")
        goal = len(self.text) + answer
        self._wait(lambda: len(self.text) >= goal, "an answer")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what!r} did not come: {self.text[-2000:]}"
            self._read(0.2)

    def end(self) -> int:
        """Wait for the end; give the exit code."""
        deadline = time.monotonic() + SECONDS
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"the chat did not end: {self.text[-2000:]}"
            self._read(0.2)
        return self._process.returncode

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> None:
        if select.select([self._master], [], [], seconds)[0]:
            try:
                new = os.read(self._master, 65536)
            except OSError:
                time.sleep(0.05)  # the other side is closed: the process is about to end
                return
            self.seen += new
            # Where is the cursor? A terminal says it; without it no status line is shown.
            for _ in range(new.count(b"\x1b[6n")):
                os.write(self._master, b"\x1b[20;1R")


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for terminal in made:
        terminal.close()


def test_a_chat_in_a_terminal(url: str, tmp_path: Path, terminals: list[Terminal]) -> None:
    terminal = Terminal([*flags(url, tmp_path), "--max-new-tokens", "3000", "--history", str(tmp_path / "history")])
    terminals.append(terminal)
    at = terminal.wait_for("every message is kept as it is in")
    at = terminal.wait_for("0 bytes sent · /help", after=at)
    terminal.send("tell me a story\x1b\rof two lines", answer=200)
    terminal.type("\x03")
    at = terminal.wait_for("stopped; what came is kept", after=at)
    at = terminal.wait_for("tokens/s", after=at)
    # The chat goes on: another answer, stopped too, of which only what is new was sent.
    terminal.send("and then?", answer=100)
    terminal.type("\x03")
    at = terminal.wait_for("stopped; what came is kept", after=at)
    terminal.type_at_prompt("/stats\r")
    at = terminal.wait_for("of them the server had already", after=at)
    cached = int(re.findall(r"(\d+) of them the server", terminal.text)[-1])
    prompt = int(re.findall(r"(\d+) tokens in the prompt", terminal.text)[-1])
    assert prompt - cached < 30 < cached
    terminal.type_at_prompt("/xyz\r")
    at = terminal.wait_for("there is no command /xyz", after=at)
    terminal.type_at_prompt("\x04")
    assert terminal.end() == 0
    assert "of two lines" in (tmp_path / "history").read_text(encoding="utf-8")


def test_ctrl_c_at_an_empty_prompt_leaves(url: str, tmp_path: Path, terminals: list[Terminal]) -> None:
    terminal = Terminal(flags(url, tmp_path))
    terminals.append(terminal)
    terminal.wait_for("0 bytes sent · /help")
    terminal.type_at_prompt("half a mess\x03")
    terminal.type("\x03")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text


def chat_in_pipe(arguments: list[str], lines: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edge_client", *arguments]
    return subprocess.run(command, input=lines.encode(), capture_output=True, timeout=SECONDS, check=False)


def test_lines_from_a_pipe(url: str, tmp_path: Path) -> None:
    arguments = [*flags(url, tmp_path), "--max-new-tokens", "12", "--speculate", "off"]
    done = chat_in_pipe(arguments, "tell me a störy 猫\nand then?\n/stats\n")
    assert done.returncode == 0, done.stderr.decode()
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.stdout
    assert b"of them the server had already" in done.stderr
    alone = chat_in_pipe(arguments, "tell me a störy 猫\n")
    assert done.stdout.startswith(alone.stdout)
    assert len(done.stdout) > len(alone.stdout)


def test_an_answer_is_exact_in_a_pipe_and_harmless_in_a_terminal(
    url: str, tmp_path: Path, terminals: list[Terminal]
) -> None:
    arguments = ["generate", *flags(url, tmp_path)[1:], "--prompt", "x", "--max-new-tokens", "300", "--quiet"]
    done = chat_in_pipe(arguments, "")
    assert done.returncode == 0, done.stderr.decode()
    ours = re.compile("[^\n\t\r -~\xa0-\U0010ffff]")
    said = done.stdout.decode()
    # A random model says control characters too.
    assert ours.search(said)
    terminal = Terminal(arguments)
    terminals.append(terminal)
    assert terminal.end() == 0
    shown = terminal.seen.decode()
    assert not ours.search(shown)
    assert shown == ours.sub("\ufffd", said).replace("\r", "").replace("\n", "\r\n")


def test_mistakes_in_a_pipe_have_their_exit_codes(url: str, tmp_path: Path) -> None:
    done = chat_in_pipe(flags(url, tmp_path), "/nois 0.1\nnever sent\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"did you mean /noise?" in done.stderr
    done = chat_in_pipe([*flags(url, tmp_path), "--history", str(tmp_path / "history")], "hello\n")
    assert done.returncode == 2
    assert not (tmp_path / "history").exists()
    done = chat_in_pipe([*flags("http://127.0.0.1:9", tmp_path), "--reconnect-seconds", "0"], "hello\n")
    assert done.returncode == 3
