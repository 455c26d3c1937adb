"""Starts real split-servers and load tests in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

PATIENCE_SECONDS = 60.0


def clean_environment(home: Path) -> dict[str, str]:
    """No settings of the user's, and folders of the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FL_LLAMA_")}
    return kept | {"XDG_CONFIG_HOME": str(home / "config")}


class Command:
    """A running command; stderr is read along so that it never fills its pipe."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(home),
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def wait_for(self, pattern: str) -> str:
        """Wait for a line on stderr; give the pattern's first group."""

        def found() -> str | None:
            alive = self.process.poll() is None
            match = re.search(pattern, self.said())
            assert match or alive, f"the command ended; stderr:\n{self.said()}"
            return match[1] if match else None

        return eventually(found, self.said)

    def said(self) -> str:
        return "".join(self.errors)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; give the exit code and stdout."""
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        self._reader.join()
        return self.process.wait(timeout=PATIENCE_SECONDS), output

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


def eventually(condition: Callable[[], object], said: Callable[[], str] = lambda: "") -> str:
    """Wait until `condition` gives something; give that."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain; stderr:\n{said()}"
        time.sleep(0.02)
    return str(value)


@dataclass
class Bench:
    """Starts servers and load tests in one folder, and ends what is left of them."""

    home: Path
    checkpoint: Path
    commands: list[Command] = field(default_factory=list)

    def start(self, *arguments: str) -> Command:
        self.commands.append(Command(list(arguments), self.home))
        return self.commands[-1]

    def server(self) -> tuple[Command, str]:
        command = self.start("-m", "serving.cli", str(self.checkpoint), "--port", "0", "--threads", "1")
        return command, command.wait_for(r"ready url=(\S+)")

    def load(self, url: str, *arguments: str) -> Command:
        folders = ["--cache-dir", str(self.home / "cache"), "--state-dir", str(self.home / "state")]
        return self.start("-m", "loadtest", "run", "--server", url, *folders, *arguments)


def sample(text: str, name: str) -> float:
    """The sum of a metric's samples."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def scraped(url: str) -> str:
    return httpx.get(url, trust_env=False).text
