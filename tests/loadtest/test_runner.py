"""The closed loop over an edge that is a fake: how many at once, when it ends, and what is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.generate import PREFILL_ROWS, GenerationStats
from edge_client.session_state import SessionState
from edge_client.step_log import EncodedRows
from loadtest import runner as module
from loadtest.records import Record
from loadtest.runner import INTERRUPTED, TIMED_OUT, Runner, footprint
from loadtest.settings import LoadSettings
from loadtest.workload import Vocabulary, Workload, parse_lengths
from split_llama.errors import ContextExceeded, OutOfPages, ServerUnreachable
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Open

WIDTH = 8
SETTINGS = LoadSettings(server="http://127.0.0.1:1", clients=3, requests=7)


def fake_session(rows: Sequence[EncodedRows] = (), max_frame_bytes: int = 65536) -> Any:
    state = SessionState(Open(session="0" * 32, secret="0" * 64, blocks=(1, 2)), WIDTH)
    state.attach(1, max_frame_bytes, 1 << 30)
    for part in rows:
        state.log.write(len(state.log), part)
    remote = SimpleNamespace(state=state, bytes_up=len(state.log) * 10, bytes_down=5)
    return SimpleNamespace(stats=GenerationStats(round_trips=1), remote=remote)


class FakeEdge:
    """Answers with two tokens, each after a turn of the event loop; `failure` is raised instead, or it hangs."""

    def __init__(self, failure: BaseException | None = None, *, hangs: bool = False) -> None:
        self.failure = failure
        self.hangs = hangs
        self.open_now = 0
        self.most_open = 0
        self.two_open = asyncio.Event()

    def params(self, **values: Any) -> Any:
        return values

    def turn(self, prompt_ids: Sequence[int], params: Any) -> Any:
        if isinstance(self.failure, ContextExceeded):
            raise self.failure
        return params

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        if self.open_now == 2:
            self.two_open.set()
        session = fake_session()
        session.generate = self.generate
        try:
            yield session
        finally:
            self.open_now -= 1

    async def generate(self, prompt_ids: Sequence[int], turn: Any) -> AsyncIterator[None]:
        if self.failure is not None:
            raise self.failure
        if self.hangs:
            await asyncio.Event().wait()
        for _ in range(2):
            await asyncio.sleep(0)
            yield None


class Bench:
    def __init__(self, edge: FakeEdge, settings: LoadSettings = SETTINGS) -> None:
        self.started = 0
        self.records: list[Record] = []
        one = parse_lengths("4")
        workload = Workload(0, one, one, Vocabulary(100))
        fake: Any = edge
        self.runner = Runner(fake, workload, settings, 0, self.start, self.records.append)

    def start(self) -> None:
        self.started += 1


async def test_each_client_has_one_request_at_a_time() -> None:
    edge = FakeEdge()
    bench = Bench(edge)
    await bench.runner.run(3, iter(range(7)))
    assert edge.most_open == 3
    assert edge.open_now == 0
    assert bench.started == len(bench.records) == 7
    assert sorted(record.index for record in bench.records) == list(range(7))
    assert all(record.answered and record.output_tokens == 2 for record in bench.records)


async def test_the_duration_ends_an_endless_run() -> None:
    bench = Bench(FakeEdge(), dataclasses.replace(SETTINGS, duration=0.05, requests=None))
    async with asyncio.timeout(30):
        await bench.runner.run(2, iter(range(10**9)))
    assert bench.records


async def test_a_hanging_server_is_given_up() -> None:
    bench = Bench(FakeEdge(hangs=True), dataclasses.replace(SETTINGS, request_timeout=0.02))
    await bench.runner.run(2, iter(range(2)))
    assert [record.error for record in bench.records] == [TIMED_OUT, TIMED_OUT]


async def test_refusals_are_recorded_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BREATH_SECONDS", 0.0)
    bench = Bench(FakeEdge(OutOfPages("none left")))
    await bench.runner.run(2, iter(range(5)))
    assert [(record.error, record.message) for record in bench.records] == [("OutOfPages", "none left")] * 5
    assert all(record.footprint is not None and record.footprint.open_rows for record in bench.records)


async def test_what_fails_before_a_session_is_opened_leaves_no_footprint() -> None:
    bench = Bench(FakeEdge(ContextExceeded("too long")))
    await bench.runner.run(1, iter(range(1)))
    (record,) = bench.records
    assert (record.error, record.footprint) == ("ContextExceeded", None)


async def test_a_lost_server_ends_the_run() -> None:
    bench = Bench(FakeEdge(ServerUnreachable("gone")))
    await bench.runner.run(3, iter(range(1000)))
    assert len(bench.records) <= 3
    assert {record.error for record in bench.records} == {"ServerUnreachable"}


async def test_what_is_broken_off_is_recorded_and_closed() -> None:
    edge = FakeEdge(hangs=True)
    bench = Bench(edge)
    run = asyncio.create_task(bench.runner.run(2, iter(range(2))))
    await edge.two_open.wait()
    run.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await run
    assert [record.error for record in bench.records] == [INTERRUPTED, INTERRUPTED]
    assert edge.open_now == 0


def encoded(codec: Codec, count: int) -> EncodedRows:
    return EncodedRows(codec, count, bytes(count * row_bytes(codec, WIDTH)))


@given(st.integers(1, 400), st.integers(0, 20), st.booleans(), st.integers(1, 60))
def test_footprint_counts_every_answered_row_once(prompt: int, answered: int, bos: bool, rows: int) -> None:
    head = [encoded(Codec.FP32, 1)] if bos else []
    body = [encoded(Codec.FP16, prompt - bos)] if prompt > bos else []
    tail = [encoded(Codec.FP16, 1)] * answered
    session = fake_session([*head, *body, *tail], max_frame_bytes=32 + rows * row_bytes(Codec.FP16, WIDTH))
    found = footprint(session, prompt, answered=True)
    assert found.prompt_rows + found.decode_rows + found.either_rows == prompt + answered
    assert found.decode_rows == answered
    assert found.open_rows == 0
    largest = min(session.remote.state.rows_per_step(Codec.FP16), PREFILL_ROWS)
    assert answered + (prompt + largest - 1) // largest <= found.steps <= prompt + answered


def test_footprint_of_a_known_prompt() -> None:
    # BOS goes apart in fp32, and a chunk has 128 tokens: 1 + 127 rows, 128, and 1 that looks like generation.
    rows = [encoded(Codec.FP32, 1), encoded(Codec.FP16, 256), *[encoded(Codec.FP16, 1)] * 3]
    found = footprint(fake_session(rows), 257, answered=False)
    assert (found.steps, found.prompt_rows, found.either_rows, found.decode_rows) == (7, 256, 1, 3)
    assert (found.open_rows, found.bytes_up, found.bytes_down) == (1, 2600, 5)


def test_a_prompt_answered_in_part_leaves_the_rest_open() -> None:
    found = footprint(fake_session([encoded(Codec.FP16, 128)]), 300, answered=False)
    assert (found.steps, found.prompt_rows, found.open_rows) == (1, 128, 172)
