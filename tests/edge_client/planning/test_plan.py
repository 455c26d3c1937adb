"""`edge-client plan` and `--partition auto` against a real server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.planning.auto import resolve_partition
from edge_client.planning.cost import Choice, Curve, Format, Task, predict
from edge_client.planning.device import block_curve, queued_curves
from edge_client.planning.measure import (
    Subject,
    find_subject,
    formats_to_try,
    least_partition,
    measure,
    own_format,
)
from edge_client.planning.random_checkpoint import RandomCheckpoint
from edge_client.rest import ModelCard, RestClient
from edge_client.settings import EdgeSettings
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.errors import ModelMismatch, UsageError
from split_llama.wire.codec import Codec
from tests.edge_client.conftest import MakeSettings, ServeModel, ServerProcess
from tests.edge_client.planning.conftest import RunEdge
from tests.tiny_models import FAMILIES, TinyModel, write_model

INT8 = Format("float32", "int8")


def silent(_line: str) -> None:
    pass


def ask(settings: EdgeSettings, **changes: Any) -> Subject:
    rest = RestClient.of(settings)
    try:
        return find_subject(settings, rest, dataclasses.replace(rest.model_card(), **changes))
    finally:
        rest.close()


def resolve(settings: EdgeSettings, lines: list[str]) -> Partition:
    rest = RestClient.of(settings)
    try:
        return resolve_partition(settings, rest, rest.model_card(), lines.append)
    finally:
        rest.close()


def card(start: int, stop: int, blocks: int) -> ModelCard:
    return ModelCard("m", "0" * 64, BlockRange(start, stop), blocks, 32, 256, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_every_shape_of_the_real_ones(tmp_path: Path, family: str) -> None:
    real = Checkpoint.open(write_model(tmp_path / "model", TinyModel(family=family)))
    partition = Partition(1, 2)
    made = RandomCheckpoint.of(real.raw_config, real.config, partition)
    left_out = "model.layers.1."
    expected = {name: info.shape for name, info in real.tensors.items() if not name.startswith(left_out)}
    assert {name: info.shape for name, info in made.tensors.items()} == expected
    assert all(tuple(made.tensor(name).shape) == shape for name, shape in expected.items())


async def test_everything_is_measured_and_nothing_fetched(
    tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = write_model(tmp_path / "model", TinyModel(layers=6))
    async with serve_model(folder, allowed_partitions="1,1") as url:
        settings = edge_settings(url, noise="0.02")
        subject = await asyncio.to_thread(ask, settings)
        findings = await measure(subject, [Format("float32"), INT8], silent)
        (tmp_path / "cache").mkdir(exist_ok=True)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        assert not (tmp_path / "state").exists()  # neither the secret nor a pin was touched
    measured = findings.measured
    assert [device.format for device in measured.devices] == [Format("float32"), INT8]
    assert measured.link.round_trip > 0
    assert measured.server.blocks == 3  # [2, 5): one block more in front than behind
    assert measured.server.step.at(1) > 0
    for device in measured.devices:
        assert device.block.at(1) > 0
        assert device.head.at(1) > 0
        assert device.codec.at(1) > 0
        assert device.overhead > 0
    float32, int8 = measured.devices
    assert float32.block_bytes > int8.block_bytes > 0
    assert measured.drafting.source == "assumed"
    one = predict(measured, Choice(Partition(1, 1), INT8, Codec.INT8, 0), Task(8, 8, True))
    assert one.tokens_per_second > 0


async def test_the_least_model_that_leaves_room(
    tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    """Two blocks: one here, one there, none behind."""
    folder = write_model(tmp_path / "model", TinyModel(layers=2, max_positions=16))
    async with serve_model(folder) as url:
        subject = await asyncio.to_thread(ask, edge_settings(url))
        findings = await measure(subject, [Format("float32")], silent)
    assert findings.measured.model.partitions() == [Partition(1, 0)]
    assert findings.measured.devices[0].block.at(1) > 0


async def test_a_server_that_says_two_things_is_not_believed(
    tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(write_model(tmp_path / "model", TinyModel())) as url:
        with pytest.raises(ModelMismatch, match=r"config\.json is not that of the model"):
            await asyncio.to_thread(ask, edge_settings(url), geometry="f" * 64)


def test_least_partition() -> None:
    assert least_partition(card(0, 8, 8)) == Partition(1, 1)
    assert least_partition(card(2, 5, 8)) == Partition(2, 3)
    assert least_partition(card(0, 2, 2)) == Partition(1, 0)
    with pytest.raises(UsageError, match="no partition with a block in front"):
        least_partition(card(0, 1, 1))


def test_a_block_is_what_one_more_takes() -> None:
    """A with two blocks and C with one, each with half a millisecond beside its blocks."""
    a, c = Curve.of({1: 2.5, 16: 4.5}), Curve.of({1: 1.5, 16: 2.5})
    block = block_curve(a, c, 2, 1)
    assert [block.at(rows) for rows in (1, 16)] == [1.0, 2.0]
    # Noise made C as slow as A: then a block still takes something, and no more than its share of either.
    assert block_curve(a, a, 2, 1).at(1) == 2.5 / 4


def test_clocks_of_a_queue() -> None:
    """C returns at once and the head waits for it: a block's time goes from the head to C, the sum stays."""
    a, c, head = Curve.of({1: 4.0}), Curve.of({1: 0.1}), Curve.of({1: 2.9})
    block, true_c, true_head = queued_curves(a, c, head, 2, 1)
    assert (block.at(1), true_c.at(1)) == (2.0, 2.0)
    assert true_head.at(1) == pytest.approx(1.0)


def test_own_format_comes_first() -> None:
    settings = EdgeSettings(server="http://127.0.0.1:1", dtype="bf16")
    own = own_format(settings, card(1, 7, 8), "cpu")
    tried = formats_to_try(own, "cpu")
    assert own == tried[0] == Format("bfloat16")
    assert len(set(tried)) == len(tried) == 4
    assert {format.quantization for format in tried} == {"none", "int8"}  # what a CPU has


async def test_auto_keeps_its_choice(tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings) -> None:
    folder = write_model(tmp_path / "model", TinyModel(layers=6))
    async with serve_model(folder, allowed_partitions="1,1") as url:
        settings = edge_settings(url, partition="auto")
        lines: list[str] = []
        first = await asyncio.to_thread(resolve, settings, lines)
        assert "measuring" in lines[0]
        assert f"partition {first}: " in lines[1]
        assert first.p >= 1
        (kept,) = (tmp_path / "state" / "plans").glob("*.json")
        # Whatever a new measurement would say, what was chosen stays.
        kept.write_text(json.dumps({"partition": "2,3", "reason": "because"}))
        lines.clear()
        assert await asyncio.to_thread(resolve, settings, lines) == Partition(2, 3)
        assert "as chosen before" in lines[0]
        assert "because" in lines[0]
        assert len(lines) == 1
        for broken in ('{"partition": "0,1", "reason": ""}', '{"partition": "9,9", "reason": ""}', "{"):
            kept.write_text(broken)
            assert (await asyncio.to_thread(resolve, settings, [])).p >= 1
            assert json.loads(kept.read_text())["reason"]


async def test_a_server_with_other_blocks_gets_a_choice_of_its_own(
    tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = write_model(tmp_path / "model", TinyModel(layers=6))
    for allowed, least in (("1,1", 1), ("2,2", 2)):
        async with serve_model(folder, allowed_partitions=allowed) as url:
            chosen = await asyncio.to_thread(resolve, edge_settings(url, partition="auto"), [])
            assert min(chosen.p, chosen.q) >= least
    assert len(list((tmp_path / "state" / "plans").glob("*.json"))) == 2


def test_plan_then_auto(tmp_path: Path, server_process: Callable[..., ServerProcess], run_edge: RunEdge) -> None:
    server = server_process(
        write_model(tmp_path / "model", TinyModel(layers=6)), "--allowed-partitions", "1,2", "--threads", "1"
    )
    server.start()
    here = ("--server", server.url, "--threads", "1", "--device", "cpu")
    done = run_edge("plan", *here, "--json", "--target-rtt", "20", "--target-rtt", "80", "--acceptance", "0.7")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    best = report["recommended"]
    assert best["flags"].startswith(f"--partition {best['partition']} ")
    assert {one["partition"] for one in report["varied"]["partition"]} <= {"1,2", "2,2", "1,3", "3,2", "2,3", "1,4"}
    assert len(report["varied"]["format"]) == 4 - len(report["notes"])
    assert report["drafting"]["acceptance"] == 0.7
    measured, near, far = (one["round_trip_ms"] for one in report["round_trips"])
    assert (near, far) == (20, 80)
    assert measured > 0
    speeds = [one["tokens_per_second"] for one in report["round_trips"][1:]]
    assert speeds == sorted(speeds, reverse=True)
    assert f"--partition auto means {best['partition']}" in done.err
    answer = run_edge("generate", *here, "--partition", "auto", "--prompt", "da", "--json", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err
    assert f"partition {best['partition']}, as chosen before" in answer.err
    assert server.sessions() == []


def test_plan_as_text_with_measured_guesses(
    tmp_path: Path, server_process: Callable[..., ServerProcess], run_edge: RunEdge
) -> None:
    server = server_process(write_model(tmp_path / "model", TinyModel()))
    server.start()
    done = run_edge("plan", "--server", server.url, "--threads", "1", "--measure-drafts", "--target-rtt", "40")
    assert done.code == 0, done.err
    assert "recommended: --partition " in done.out
    assert "no proof of privacy" in done.out
    assert "40.000 ms" in done.out
    assert "guesses right in" in done.out or "no guess was made" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target-rtt", "-1"), "--target-rtt -1.0: expected milliseconds"),
        (("--acceptance", "2"), "--acceptance 2.0: expected a share"),
        (("--answer-tokens", "0"), "--answer-tokens 0: expected 1"),
        (("--partition", "some"), "or auto"),
    ],
)
def test_wrong_usage(run_edge: RunEdge, flags: tuple[str, ...], message: str) -> None:
    done = run_edge("plan", "--server", "http://127.0.0.1:1", *flags)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_no_server(run_edge: RunEdge) -> None:
    done = run_edge("plan", "--server", "http://127.0.0.1:1", "--reconnect-seconds", "0")
    assert done.code == 3
