"""Whoever is killed or lost, whenever: the same final weights; and who does not come back does not stop the others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from torch import Tensor

from split_llama.errors import CacheError, ServerUnreachable, UnknownJob
from tests.training.server.world import (
    Client,
    FakeHost,
    World,
    adapters,
    begin,
    close_to,
    config_of,
    same,
    train,
    until,
)
from training.checkpoints import Checkpoints
from training.job_config import JobConfig
from training.server.extension import TrainingExtension
from training.server.job import UNJOINED_DAYS, Job

STRATEGIES = ["sequential", "client-batch", "server-hierarchical"]


def config(strategy: str, **fields: Any) -> JobConfig:
    own = strategy == "server-hierarchical"
    return config_of(
        **{
            "strategy": strategy,
            "clients": 2,
            "steps": 12,
            "checkpoint_every": 3,
            "average_every": 3,
            "shared": "A,B,C" if own else "B",
            "rejoin_seconds": 30.0,
        }
        | fields
    )


async def outcome_of(job: Job, clients: list[Client]) -> list[dict[str, Tensor]]:
    return [await adapters(job), *(client.weights for client in clients)]


def compare(strategy: str, one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    for left, right in zip(one, other, strict=True):
        if strategy == "server-hierarchical":
            close_to(left, right, 1e-6)
        else:
            same(left, right)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("clients_too", [False, True])
async def test_a_server_that_is_killed_goes_on_from_its_checkpoints(
    world: World, strategy: str, clients_too: bool
) -> None:
    job, clients = await train(world, config(strategy))
    expected = await outcome_of(job, clients)
    job, clients = await begin(world, config(strategy))
    await until(lambda: job.record.step >= 7)
    for client in clients:
        await client.kill() if clients_too else client.drop()
    await world.restart()
    job = world.extension.find(job.record.id)
    assert job.state == "waiting"
    for client in clients:
        client.job = job
        client.again()
        assert await client.ended() == "done" if client is clients[-1] else True
    await clients[0].ended()
    compare(strategy, expected, await outcome_of(job, clients))
    assert job.record.generation == 2
    assert clients[0].starts[-1].step in (3, 6, 9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shared", ["B", "A,B,C"])
async def test_a_client_that_is_killed_takes_all_back_to_its_checkpoint(
    world: World, strategy: str, shared: str
) -> None:
    job, clients = await train(world, config(strategy, shared=shared))
    expected = await outcome_of(job, clients)
    job, clients = await begin(world, config(strategy, shared=shared))
    await until(lambda: job.record.step >= 7)
    await clients[1].kill()
    clients[1].again()
    for client in clients:
        assert await client.ended() == "done"
    compare(strategy, expected, await outcome_of(job, clients))
    assert [start.step for start in clients[0].starts] == [0, clients[1].starts[-1].step]
    # Who had no share in the steps since its checkpoint goes on with it, and nobody has to go back.
    assert clients[1].starts[-1].step in (3, 6, 9) or not clients[1].starts[-1].restore


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_killed_before_any_checkpoint_all_begin_again(world: World, strategy: str) -> None:
    fields = {"checkpoint_every": 100, "average_every": 100, "steps": 6}
    job, clients = await train(world, config(strategy, **fields))
    expected = await outcome_of(job, clients)
    job, clients = await begin(world, config(strategy, **fields))
    await until(lambda: job.record.step >= 2)
    await clients[0].kill()
    clients[0].again()
    for client in clients:
        assert await client.ended() == "done"
    compare(strategy, expected, await outcome_of(job, clients))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_lost_connection_costs_the_step_under_way_alone(world: World, strategy: str) -> None:
    fields = {"checkpoint_every": 100, "shared": "B"}
    job, clients = await train(world, config(strategy, **fields))
    expected = await outcome_of(job, clients)
    job, clients = await begin(world, config(strategy, **fields))
    for at in (3, 7):
        await until(lambda at=at: job.record.step >= at)
        clients[1].drop()
        await until(lambda: job.state == "waiting")
        clients[1].again()
    for client in clients:
        assert await client.ended() == "done"
    compare(strategy, expected, await outcome_of(job, clients))
    # Without a checkpoint they went on from where they were.
    assert all(start.step > 0 and start.restore for start in clients[0].starts[1:])


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_who_does_not_come_back_does_not_stop_the_others(world: World, strategy: str) -> None:
    job, clients = await begin(world, config(strategy, rejoin_seconds=0.05, clients=3, steps=20))
    await until(lambda: job.record.step >= 4)
    clients[1].drop()
    await until(lambda: job.record.generation == 2)
    assert clients[0].starts[-1].present == (0, 2) if clients[0].starts[-1].generation == 2 else True
    await until(lambda: job.record.step >= 8)
    generation = job.record.generation
    clients[1].again()
    await until(lambda: job.record.generation == generation + 1)
    for client in clients:
        assert await client.ended() == "done"
    assert not clients[1].starts[-1].restore
    assert clients[0].starts[-1].restore
    assert clients[0].starts[-1].present == (0, 1, 2)
    assert clients[0].starts[-1].step >= 7, "nobody went back for it"


async def test_who_leaves_is_not_waited_for(world: World) -> None:
    job, clients = await begin(world, config("client-batch"))
    await until(lambda: job.record.step >= 4)
    clients[1].work.cancel()
    clients[1].guest.leave()
    assert await clients[0].ended() == "done"
    assert clients[0].starts[-1].present == (0,)


async def test_a_full_disk_is_counted_and_shown_and_the_job_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Checkpoints, *args: Any) -> None:
        raise CacheError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        job, clients = await begin(world, config("client-batch", steps=40))
        await until(lambda: job.record.step >= 8)
        assert job.keeper.error == "no space left on device"
    await until(lambda: job.keeper.error is None)
    assert await clients[0].ended() == "done"
    assert world.host.counts["training_checkpoint_errors"] >= 2


async def test_a_job_that_ended_is_still_known_after_a_restart(world: World) -> None:
    job, _ = await train(world, config("client-batch", steps=3))
    weights = await adapters(job)
    await world.restart()
    job = world.extension.find(job.record.id)
    assert (job.state, job.record.step) == ("done", 3)
    same(weights, await adapters(job))


async def test_adapters_can_be_fetched_before_anybody_is_back(world: World) -> None:
    job, clients = await begin(world, config("client-batch", steps=200))
    await until(lambda: len(job.keeper.kept) > 0)
    for client in clients:
        client.drop()
    await world.restart()
    job = world.extension.find(job.record.id)
    weights = await adapters(job)
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


async def test_jobs_of_another_model_and_damaged_ones_are_left_where_they_are(world: World) -> None:
    job, _ = await world.create(config("client-batch"))
    other, _ = await world.create(config("client-batch"))
    await world.extension.close()
    mine, broken = (world.files / each.record.id / "job.json" for each in (job, other))
    mine.write_text(mine.read_text().replace(job.record.geometry, "0" * 64))
    broken.write_text("{")
    await world.restart()
    assert world.extension.jobs == []
    assert mine.exists()
    assert broken.exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_server_that_is_killed_before_it_says_that_a_job_is_done_says_so_later(
    world: World, strategy: str
) -> None:
    job, clients = await train(world, config(strategy, steps=3))
    weights = await adapters(job)
    await world.extension.close()
    file = world.files / job.record.id / "job.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"ended": None}))
    await world.restart()
    job = world.extension.find(job.record.id)
    for client in clients:
        client.job, client.reason = job, None
        client.again()
    for client in clients:
        async with asyncio.timeout(20):
            assert await client.ended() == "done"
    same(weights, await adapters(job))


async def test_while_jobs_are_being_read_a_client_is_told_to_ask_again(world: World) -> None:
    job, _ = await world.create(config("client-batch"))
    await world.extension.close()
    world.extension = extension = TrainingExtension(world.host)
    reading = asyncio.create_task(extension.start())
    await asyncio.sleep(0)
    for ask in (lambda: extension.find(job.record.id), lambda: extension.of_owner("somebody")):
        with pytest.raises(ServerUnreachable) as refused:
            ask()
        assert refused.value.retry_after_ms > 0
    with pytest.raises(ServerUnreachable):
        await world.create(config("client-batch"))
    await reading
    assert [each.record.id for each in extension.of_owner("somebody")] == [job.record.id]
    with pytest.raises(UnknownJob):
        extension.find("job-0")


async def test_code_that_is_no_longer_allowed_is_not_run_after_a_restart(world: World) -> None:
    named = "tests.training.server.own_strategy:Everybody"
    world.host.plugins = (named,)
    job, _ = await world.create(config_of(strategy=named))
    await world.restart()
    assert world.extension.jobs == []
    host = FakeHost(world.folder, world.files)
    host.plugins = (named,)
    await world.restart(host)
    assert [each.record.id for each in world.extension.jobs] == [job.record.id]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("server_too", [False, True])
async def test_who_lost_all_its_states_costs_the_others_nothing(world: World, strategy: str, server_too: bool) -> None:
    job, clients = await begin(world, config(strategy, steps=24))
    await until(lambda: job.record.step >= 10)
    await clients[1].kill()
    clients[1].saved = {}
    if server_too:
        clients[0].drop()
        await world.restart()
        job = world.extension.find(job.record.id)
        clients[0].job = clients[1].job = job
        clients[0].again()
    clients[1].again()
    for client in clients:
        assert await client.ended() == "done"
    assert clients[0].starts[-1].step >= (6 if server_too else 9)
    assert clients[0].starts[-1].restore
    if strategy != "sequential":
        assert not clients[1].starts[-1].restore
    weights = await adapters(job)
    for client in clients:
        same(client.weights, {name: weights[name] for name in client.weights if name in weights} or client.weights)


async def test_a_job_that_nobody_joins_ends_and_its_place_is_free(world: World) -> None:
    job, _ = await world.create(config("client-batch"))
    joined, clients = await begin(world, config("client-batch", steps=100))
    await until(lambda: joined.record.step >= 1)
    for each in (job, joined):
        each.record.created -= UNJOINED_DAYS * 86400 + 1
    await job.pause()
    await until(lambda: job.state == "cancelled")
    assert "nobody joined" in str(job.record.reason)
    assert await clients[0].ended() == "done"
