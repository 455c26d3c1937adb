"""`edge-client bench` against a real server: the parts add up, and say whose they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.planning.bench import Bench, BenchPlan
from edge_client.planning.bench_report import LABELS, as_text
from edge_client.planning.server_clock import ServerClock
from edge_client.planning.watch import Round, Watched, mean_parts
from edge_client.runtime import EdgeRuntime
from edge_client.work import PhaseTimes
from tests.edge_client.conftest import MakeSettings, ServeModel, ServerProcess
from tests.edge_client.planning.conftest import RunEdge
from tests.tiny_models import TinyModel, write_model

SECONDS = st.floats(0, 1)
PHASES = st.builds(PhaseTimes, *([st.floats(0, 0.1)] * 6))
ROUNDS = st.builds(Round, st.integers(1, 9), SECONDS, st.floats(0.7, 1), PHASES, st.integers(0, 8), st.integers(0, 8))
ANSWERS = st.builds(
    Watched, st.just(8), SECONDS, st.lists(ROUNDS, min_size=1).map(tuple), st.integers(0, 999), st.integers(0, 999)
)


def silent(_line: str) -> None:
    pass


@given(st.lists(ANSWERS, min_size=1), SECONDS, SECONDS, st.one_of(st.none(), SECONDS))
def test_parts_add_up_to_the_clock(answers: list[Watched], wire: float, way: float, server: float | None) -> None:
    parts = mean_parts(answers, wire=wire, way=way, server=server)
    seconds, tokens = sum(one.seconds for one in answers), sum(one.tokens for one in answers)
    assert parts.total * tokens == pytest.approx(seconds)
    assert min(parts.as_dict().values()) >= -1e-9


async def test_guesses_and_none_side_by_side(
    tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = write_model(tmp_path / "model", TinyModel())
    async with serve_model(folder) as url:
        settings = edge_settings(url, speculate="4", noise="0.02")
        async with EdgeRuntime.connect(settings) as edge:
            result = await Bench(settings, BenchPlan(20, 12, 2), edge).run(silent)
    assert [mode.speculate for mode in result.modes] == ["4", "off"]
    assert result.prompt_tokens == 20
    for mode in result.modes:
        assert mode.tokens == 2 * 11
        assert mode.accepted == mode.tokens - mode.round_trips
        assert mode.rows_up == mode.round_trips + mode.drafted
        assert mode.parts.total * mode.tokens == pytest.approx(sum(11 / speed for speed in mode.tokens_per_second))
        # Nobody else was served, so the server's own figures are this run's.
        assert mode.server_told
        assert 0 <= mode.parts.server < mode.parts.total
    off = result.modes[1]
    assert (off.round_trips, off.drafted) == (off.tokens, 0)
    row = 32 * 4  # fp32, hidden size 32
    assert off.bytes_up == off.tokens * (32 + row)
    text = as_text(result)
    assert all(label in text for label in LABELS.values())


async def test_what_others_take_is_not_counted_as_ours(
    tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    """With a second client at work, the server's metrics no longer tell whose time it is."""
    folder = write_model(tmp_path / "model", TinyModel())
    async with serve_model(folder) as url:
        settings = edge_settings(url, speculate="off")
        async with EdgeRuntime.connect(settings, max_sessions=2) as other, EdgeRuntime.connect(settings) as edge:

            async def disturb() -> None:
                while True:
                    ids = other.tokenizer.encode("something else")
                    async for _ in other.generate(ids, other.params(max_new_tokens=16, ignore_eos=True)):
                        pass

            disturber = asyncio.create_task(disturb())
            result = await Bench(settings, BenchPlan(8, 12, 1), edge).run(silent)
            disturber.cancel()
    (mode,) = result.modes
    assert not mode.server_told
    assert "empty round trip" in as_text(result)


async def test_the_servers_clock(tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings) -> None:
    folder = write_model(tmp_path / "model", TinyModel())
    async with serve_model(folder) as url:
        settings = edge_settings(url)
        begin = await asyncio.to_thread(ServerClock.read, settings)
        async with EdgeRuntime.connect(settings) as edge:
            async for _ in edge.generate([1, 5, 6], edge.params(max_new_tokens=5, ignore_eos=True)):
                pass
        end = await asyncio.to_thread(ServerClock.read, settings)
        text = (await asyncio.to_thread(httpx.get, f"{url}/metrics")).text
    assert begin is not None
    assert end is not None
    spent = end.since(begin)
    assert spent.steps == 5  # the prompt and four tokens
    nothing = ServerClock(0, 0)
    assert spent.per_step(nothing, 5) == pytest.approx(spent.seconds / 5)
    assert spent.per_step(nothing, 4) is None
    assert ServerClock.parse(text) is not None
    assert ServerClock.parse(text.replace("model_pass_seconds_sum", "other")) is None
    assert ServerClock.parse("<html>") is None


async def test_no_metrics_no_clock(edge_settings: MakeSettings) -> None:
    settings = edge_settings("http://127.0.0.1:1")
    assert await asyncio.to_thread(ServerClock.read, settings) is None


def test_the_command(tmp_path: Path, server_process: Callable[..., ServerProcess], run_edge: RunEdge) -> None:
    server = server_process(write_model(tmp_path / "model", TinyModel()))
    server.start()
    few = ("--server", server.url, "--prompt-tokens", "16", "--new-tokens", "8", "--repeats", "2", "--threads", "1")
    done = run_edge("bench", *few, "--json", "--quiet", "--speculate", "off")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    (mode,) = report["modes"]
    spent = mode["ms_per_token"]
    assert spent["total"] == pytest.approx(sum(value for name, value in spent.items() if name != "total"), abs=1e-4)
    assert (mode["tokens"], mode["round_trips"]) == (14, 14)
    assert report["link"]["round_trip_seconds"] > 0
    table = run_edge("bench", *few)
    assert table.code == 0
    assert "edge overhead" in table.out
    assert "speculate auto" in table.out
    assert "speculate off" in table.out
    assert "pinned" not in table.err  # that was told the first time


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--new-tokens", "1"), "--new-tokens 1: expected 2"), (("--repeats", "0"), "--repeats 0: expected 1")],
)
def test_wrong_usage(run_edge: RunEdge, flags: tuple[str, ...], message: str) -> None:
    done = run_edge("bench", "--server", "http://127.0.0.1:1", *flags)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_more_tokens_than_the_context_has(
    tmp_path: Path, server_process: Callable[..., ServerProcess], run_edge: RunEdge
) -> None:
    server = server_process(write_model(tmp_path / "model", TinyModel(max_positions=64)))
    server.start()
    done = run_edge("bench", "--server", server.url, "--new-tokens", "60")
    assert done.code == 2
    assert "64 + 60 tokens asked for, the context holds 64" in done.err


def test_one_frozen_round_counts_as_five() -> None:
    phases = PhaseTimes()
    quick, frozen = Round(1, 0.008, 0.002, phases, 0, 0), Round(1, 1.0, 0.002, phases, 0, 0)
    usual = Watched(8, 0.1, (quick,) * 20, 0, 0)
    hurt = Watched(8, 0.1, (*(quick,) * 19, frozen), 0, 0)
    assert usual.disturbance == pytest.approx(0)
    # Three rounds settle; of the 17 others one counts 50 ms in place of 10.
    assert hurt.disturbance == pytest.approx(0.040 / 17)
    assert hurt.seconds == pytest.approx(19 * 0.010 + 1.002)
