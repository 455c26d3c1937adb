"""The parent against processes that misbehave: small scripts in place of edges."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field

import pytest

from loadtest import processes
from loadtest.processes import EdgeProcesses
from loadtest.records import Record
from loadtest.settings import LoadSettings
from split_llama.errors import FlLlamaError, PartitionNotAllowed

SETTINGS = LoadSettings(server="http://127.0.0.1:1", processes=2)
READY = "import sys, json; sys.stdin.readline(); print(json.dumps({'event': 'ready'}), flush=True); "


@dataclass
class Notes:
    begun: int = 0
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def started(self) -> None:
        self.begun += 1

    def ended(self, record: Record) -> None:
        self.records.append(record)

    def problem(self, text: str) -> None:
        self.problems.append(text)


@pytest.fixture
def notes() -> Notes:
    return Notes()


def use(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(processes, "WORKER", (sys.executable, "-S", "-c", script))


async def test_a_process_that_dies_before_it_is_ready(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    use(monkeypatch, "raise SystemExit(7)")
    async with EdgeProcesses(SETTINGS, notes, print) as edges:
        with pytest.raises(FlLlamaError, match="exit code 7"):
            await edges.wait_ready()


async def test_an_error_keeps_its_class(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    event = {"event": "error", "code": PartitionNotAllowed.code, "message": "not here"}
    use(monkeypatch, f"import json; print(json.dumps({event!r}))")
    async with EdgeProcesses(SETTINGS, notes, print) as edges:
        with pytest.raises(PartitionNotAllowed, match="not here"):
            await edges.wait_ready()


async def test_a_process_that_dies_later_is_a_problem_of_the_report(
    monkeypatch: pytest.MonkeyPatch, notes: Notes
) -> None:
    use(monkeypatch, READY + "sys.stdin.readline(); sys.exit(9)")
    async with EdgeProcesses(SETTINGS, notes, print) as edges:
        await edges.wait_ready()
        edges.go()
        await edges.wait_done()
    assert sorted(notes.problems) == [f"edge process {number} ended with exit code 9" for number in (0, 1)]


async def test_a_process_that_will_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    monkeypatch.setattr(processes, "LAST_WORD_SECONDS", 0.1)
    use(monkeypatch, READY + "import time; time.sleep(600)")
    async with EdgeProcesses(SETTINGS, notes, print) as edges:
        await edges.wait_ready()
        edges.go()
        await edges.stop()
    assert len(notes.problems) == 2


async def test_one_of_them_tells_news_for_all(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    use(monkeypatch, READY + "[print(json.dumps({'event': e, 'text': 'hello'})) for e in ('note', 'started', 'done')]")
    told: list[str] = []
    async with EdgeProcesses(SETTINGS, notes, told.append) as edges:
        await edges.wait_ready()
        await edges.wait_done()
    assert told == ["hello"]
    assert notes.begun == 2
    assert notes.problems == []


async def test_a_process_that_talks_nonsense_is_ended(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    use(monkeypatch, "print('hello', flush=True); import time; time.sleep(600)")
    async with EdgeProcesses(SETTINGS, notes, print) as edges:
        with pytest.raises(FlLlamaError, match="no event"):
            await edges.wait_ready()


async def test_no_process_survives_when_all_tasks_are_cancelled(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    use(monkeypatch, READY + "import time; time.sleep(600)")
    async with asyncio.timeout(30), EdgeProcesses(SETTINGS, notes, print) as edges:
        await edges.wait_ready()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
