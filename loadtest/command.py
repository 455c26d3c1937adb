"""What `split-loadtest run` does: greet the server, run the processes, gather, check the counters, report."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loadtest.agreement import Agreement, Ledger, compare, read_counters, unchecked
from loadtest.metrics import LiveMetrics
from loadtest.processes import EdgeProcesses
from loadtest.records import Record
from loadtest.report import FORMAT, describe_agreement, render
from loadtest.settings import LoadSettings
from loadtest.stats import Tally
from loadtest.target import Greeting, greet, scrape
from split_llama.errors import FlLlamaError, UsageError

FAILED = 1
INTERRUPTED = 130
SETTLE_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 0.1


class Collector:
    """Hears of every request and keeps what the report needs: figures of the measured ones, counts of all."""

    def __init__(self, ledger: Ledger, metrics: LiveMetrics, bar: Any) -> None:
        self.tally = Tally()
        self.warmup = Tally()
        self.ledger = ledger
        self.problems: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.begin: float | None = None
        self._end = 0.0
        self._metrics = metrics
        self._bar = bar

    @property
    def wall_s(self) -> float:
        """Seconds from the start of measuring to the last end of a request."""
        return max(0.0, self._end - self.begin) if self.begin is not None else 0.0

    def started(self) -> None:
        """A request was started."""
        self._metrics.running.inc()

    def ended(self, record: Record) -> None:
        """A request ended."""
        self._metrics.running.dec()
        self.ledger.add(record)
        if record.warmup:
            self.warmup.add(record)
            return
        self._end = time.monotonic()
        self.tally.add(record)
        self._metrics.ended(record)
        self.requests.append({key: value for key, value in record.to_json().items() if key not in ("itl_ms", "warmup")})
        self._bar.update()

    def problem(self, text: str) -> None:
        """A process failed after measuring began."""
        self.problems.append(text)


def run(settings: LoadSettings) -> int:
    """Run one load test and report; give the exit code. Raises `FlLlamaError` if it could not begin."""
    settings.validate()
    return asyncio.run(_run(settings))


async def _run(settings: LoadSettings) -> int:
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    stop = asyncio.Event()
    greeting = await greet(settings.edge())
    before = read_counters(await scrape(settings.edge())) if settings.check else None
    metrics = LiveMetrics()
    metrics.clients.set(settings.clients)
    ledger = Ledger(settings.processes, greeting.bytes_up, greeting.bytes_down)
    with metrics.serve(settings.metrics_port) as url, _stops_on_signals(stop), _bar(settings) as bar:
        if url is not None:
            _notify(f"metrics at {url}")
        collector = Collector(ledger, metrics, bar)
        finished = await _load(settings, collector, stop)
        agreement = await _check(settings, collector.ledger, before) if before is not None else None
    document = _document(settings, greeting, collector, agreement) | {
        "started_at": started_at,
        "interrupted": not finished,
    }
    _write(settings, document)
    if not finished:
        return INTERRUPTED
    return 0 if is_good(collector, agreement) else FAILED


def is_good(collector: Collector, agreement: Agreement | None) -> bool:
    """Say whether everything was answered and counted."""
    failed = collector.tally.failures or collector.warmup.failures or collector.problems
    return not failed and collector.tally.answered > 0 and (agreement is None or agreement.agrees)


async def _load(settings: LoadSettings, collector: Collector, stop: asyncio.Event) -> bool:
    """Run the processes; say whether they finished by themselves."""
    async with EdgeProcesses(settings, collector, _notify) as edges:
        finished = await _until(edges.wait_ready(), stop)
        if finished:
            collector.begin = time.monotonic()
            edges.go()
            finished = await _until(edges.wait_done(), stop)
        await edges.stop()
    return finished


async def _until(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Do `work`; gives it up, and says so, when `stop` is set first."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        return False
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def _check(settings: LoadSettings, ledger: Ledger, before: dict[str, float]) -> Agreement:
    """Compare, again for a moment if need be: the server counts a reply's bytes after it was sent."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            agreement = compare(ledger, before, read_counters(await scrape(settings.edge())))
        except FlLlamaError as error:
            return unchecked(f"the server's counters cannot be read any more ({error.message})")
        if agreement.agrees or not agreement.checked or time.monotonic() > deadline:
            return agreement
        await asyncio.sleep(LOOK_AGAIN_SECONDS)


def _document(
    settings: LoadSettings, greeting: Greeting, collector: Collector, agreement: Agreement | None
) -> dict[str, Any]:
    warmup = collector.warmup.summary(0.0)["requests"]
    return {
        "format": FORMAT,
        "settings": settings.shown(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "load_average": _load_average()},
        "server": greeting.reply.model_dump(mode="json"),
        "planned_requests": settings.num_requests(),
        "warmup": warmup,
        "result": collector.tally.summary(collector.wall_s),
        "problems": collector.problems,
        "agreement": describe_agreement(agreement) if agreement is not None else None,
        "requests": collector.requests,
    }


def _load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _write(settings: LoadSettings, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2)
    if settings.json == "-":
        _notify(render(document))
        sys.stdout.write(text + "\n")
        return
    sys.stdout.write(render(document) + "\n")
    if settings.json is not None:
        try:
            Path(settings.json).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--json {settings.json} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _stops_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run in order; a second Ctrl-C ends it at once."""
    loop = asyncio.get_running_loop()
    caught = (signal.SIGINT, signal.SIGTERM)

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Windows has no such handlers: Ctrl-C ends the run at once there.
    with contextlib.suppress(NotImplementedError):
        for number in caught:
            loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError):
            for number in caught:
                loop.remove_signal_handler(number)


def _bar(settings: LoadSettings) -> Any:
    return tqdm(total=settings.num_requests(), unit="request", desc="load", leave=False, disable=None)


def _notify(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
