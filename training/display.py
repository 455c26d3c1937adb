"""How the clients of a run stand, from their log files: one bar each in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from edge_client.printable import printable
from training.client.report import LOG_FILE, StepRecord, describe

LINE_SECONDS = 10.0
_FIELDS = tuple(field.name for field in fields(StepRecord))


@dataclass
class Followed:
    """A client's log as far as it was read, from where it stood at the beginning of the run."""

    name: str
    path: Path
    position: int = 0
    rest: bytes = b""
    records: list[StepRecord] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, folder: Path) -> Followed:
        """Follow the log in a client's folder from its end on."""
        path = folder / LOG_FILE
        return cls(name, path, path.stat().st_size if path.is_file() else 0)

    def read(self) -> tuple[list[StepRecord], list[str]]:
        """Give the new records, and the new remarks."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.position)
                data = stream.read()
        except OSError:
            return [], []
        self.position += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        records, notes = [], []
        for line in lines:
            raw = _parsed(line)
            if "note" in raw:
                notes.append(str(raw["note"]))
            elif all(name in raw for name in _FIELDS):
                records.append(StepRecord(**{name: raw[name] for name in _FIELDS}))
        self.records += records
        return records, notes


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) else {}


class Display:
    """Shows clients by name. Use as a context, and call `update` now and then."""

    def __init__(self, clients: dict[str, Path], steps: int) -> None:
        self.followed = {name: Followed.of(name, folder) for name, folder in clients.items()}
        self._steps = steps
        self._is_terminal = sys.stderr.isatty()
        self._bars: dict[str, Any] = {}
        self._shown = time.monotonic()
        self._said: dict[str, StepRecord] = {}

    def __enter__(self) -> Display:
        if self._is_terminal:
            for place, name in enumerate(self.followed):
                self._bars[name] = tqdm(
                    total=self._steps, desc=name, unit="step", position=place, dynamic_ncols=True, file=sys.stderr
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.update(last=True)
        for bar in self._bars.values():
            bar.close()

    def say(self, line: str) -> None:
        """Write a line that stays."""
        text = printable(line)
        if self._bars:
            tqdm.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def update(self, *, last: bool = False) -> None:
        """Read what is new, and show it."""
        due = last or time.monotonic() - self._shown >= LINE_SECONDS
        for name, followed in self.followed.items():
            records, notes = followed.read()
            for note in notes:
                self.say(f"{name}: {note}")
            if not followed.records or not (records or due):
                continue
            newest = followed.records[-1]
            words = describe(newest, self._speed(followed))
            if name in self._bars:
                bar = self._bars[name]
                bar.n = newest.step
                bar.set_postfix_str(words, refresh=True)
            elif due and self._said.get(name) is not newest:
                self._said[name] = newest
                self.say(f"{name}: step {newest.step} of {self._steps}, {words}")
        if due:
            self._shown = time.monotonic()

    def _speed(self, followed: Followed) -> float:
        """Tokens per second of a client so far."""
        return sum(record.tokens for record in followed.records) / max(1e-9, followed.records[-1].seconds)
