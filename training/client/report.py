"""What a client tells of its training: one record per step for people, for a log file and for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from tqdm import tqdm

from edge_client.printable import printable
from edge_client.state_files import cache_errors

LOG_FILE = "log.jsonl"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One closed step. `loss` is this client's mean per target token, `job_loss` that of all who contributed.

    `tokens` are those of its sequences that it learned from; bytes and seconds are totals of this process. The last
    fields count since the process began: steps that it was left out of, that were clipped, and micro-batches that
    added nothing.
    """

    step: int
    generation: int
    loss: float | None
    job_loss: float | None
    learning_rate: float
    tokens: int
    samples: int
    bytes_up: int
    bytes_down: int
    seconds: float
    contributed: bool
    left_out: int = 0
    clipped: int = 0
    void: int = 0
    skipped: str | None = None


class Reporter(Protocol):
    """Where a client says how it goes."""

    def step(self, record: StepRecord) -> None:
        """A step is closed."""
        ...

    def note(self, text: str) -> None:
        """Something happened that is no step."""
        ...


class Watcher(Reporter, Protocol):
    """Somebody who wants to know, as long as the client runs."""

    def close(self) -> None:
        """Nothing more comes."""
        ...


class LogFile:
    """Lines of JSON, one per step. A full disk costs lines, never the training."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        with cache_errors("write the log"):
            self._stream: IO[str] | None = (folder / LOG_FILE).open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Append a line."""
        self._write(asdict(record))

    def note(self, text: str) -> None:
        """Append a remark."""
        self._write({"note": text})

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            stream, self._stream = self._stream, None
            with contextlib.suppress(OSError):
                stream.close()  # It would write what is left, and fail again.
            self._warn(f"the log cannot be written any more ({error.strerror or error}); training goes on without it")


class TensorBoard:
    """Curves for `tensorboard --logdir`. torch's writer is imported when it is made: it takes a while."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def step(self, record: StepRecord) -> None:
        """Add a point to each curve."""
        curves = {
            "loss": record.loss,
            "job_loss": record.job_loss,
            "learning_rate": record.learning_rate,
            "tokens": record.tokens,
            "bytes/up": record.bytes_up,
            "bytes/down": record.bytes_down,
        }
        for name, value in curves.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def note(self, text: str) -> None:
        """Curves have no remarks."""

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Bar:
    """A progress bar on stderr."""

    def __init__(self, name: str, steps: int, stream: IO[str] | None = None) -> None:
        self._name = name
        self._bar: Any = tqdm(total=steps, desc=name, unit="step", file=stream or sys.stderr, dynamic_ncols=True)
        self._tokens = 0

    def step(self, record: StepRecord) -> None:
        """Move the bar to the step; back, too, where the job restarted."""
        if not self._tokens:
            # Waiting for the others is no training.
            self._bar.unpause()
        self._tokens += record.tokens
        self._bar.set_postfix_str(describe(record, self._tokens / max(1e-9, record.seconds)), False)
        self._bar.n = record.step
        self._bar.refresh()

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.write(printable(f"{self._name}: {text}"), file=self._bar.fp)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Watchers:
    """Several watchers as one, closed at the end of a block."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = list(watchers)

    def add(self, watcher: Watcher) -> None:
        """One more."""
        self._watchers.append(watcher)

    def __enter__(self) -> Watchers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watcher in self._watchers:
            watcher.close()

    def step(self, record: StepRecord) -> None:
        """Tell all of a step."""
        for watcher in self._watchers:
            watcher.step(record)

    def note(self, text: str) -> None:
        """Tell all of something else."""
        for watcher in self._watchers:
            watcher.note(text)


def describe(record: StepRecord, tokens_per_second: float) -> str:
    """Say in a few words how a step went."""
    loss = record.loss if record.loss is not None else record.job_loss
    parts = [
        f"loss {loss:.4f}" if loss is not None else "loss -",
        f"{tokens_per_second:,.0f} tokens/s",
        f"up {size(record.bytes_up)}",
        f"down {size(record.bytes_down)}",
    ]
    counted = (("left out", record.left_out), ("clipped", record.clipped), ("void", record.void))
    parts += [f"{name} {count}" for name, count in counted if count]
    return ", ".join(parts)


def size(count: float) -> str:
    """Write a number of bytes in the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
