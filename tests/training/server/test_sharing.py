"""Jobs share the memory: a client that stands still does not keep it, and what can never fit is refused at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from split_llama.errors import UsageError
from split_llama.wire.frame import Kind
from split_llama.wire.training import Message
from tests.training.server.world import Client, World, adapters, begin, close_to, config_of, train, until
from training.job_config import JobConfig
from training.server import engine


class Standstill:
    """Holds back what one client sends, from its first message of a kind on, until it goes on."""

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self.kind = name, kind
        self.held: list[tuple[Client, Message]] = []
        self.over = False

    def __call__(self, client: Client, message: Message) -> Message | None:
        if self.over or client.name != self.name or (message.kind is not self.kind and not self.held):
            return message
        self.held.append((client, message))
        return None

    def go_on(self) -> None:
        self.over = True
        for client, message in self.held:
            client.post(message)


async def test_a_client_that_stands_still_does_not_hold_the_memory_of_other_jobs(world: World) -> None:
    config = config_of(strategy="client-batch", clients=1, accumulate=3, steps=2, max_length=10)
    reference, _ = await train(world, config)
    still = Standstill("client-0", Kind.BACKWARD)
    stalled, (client,) = await begin(world, config, spoil=still)
    await until(lambda: len(still.held) == 3)
    world.host.memory_bytes = world.extension.budget.held
    assert stalled.activation_bytes > world.extension.budget.held, "states that came are counted too"
    async with asyncio.timeout(60):
        other, _ = await train(world, config)
    close_to(await adapters(other), await adapters(reference), 1e-6)
    before = world.host.counts["training_recomputed"]
    still.go_on()
    assert await client.ended() == "done"
    assert world.host.counts["training_recomputed"] > before
    close_to(await adapters(stalled), await adapters(reference), 1e-6)
    assert world.extension.budget.held == 0


async def test_a_client_that_stands_still_does_not_hold_the_memory_of_its_own_job(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "STALE_SECONDS", 0.1)
    config = config_of(strategy="server-hierarchical", clients=2, steps=4, average_every=4, accumulate=3, max_length=10)
    reference, _ = await train(world, config)
    # Enough for one micro-batch at a time, more or less.
    world.host.memory_bytes = config.batch_size * config.max_length * world.width * (2 * 4 + 8)
    still, late = Standstill("client-1", Kind.BACKWARD), Standstill("client-0", Kind.FORWARD)
    job, clients = await begin(world, config, spoil=lambda *sent: still(*sent) and late(*sent))
    await until(lambda: bool(still.held and late.held))
    held = world.extension.budget.held
    assert 0 < held <= world.host.memory_bytes
    late.go_on()
    await until(lambda: job.step_of(0) == 3)
    still.go_on()
    for client in clients:
        assert await client.ended() == "done"
    close_to(await adapters(job), await adapters(reference), 1e-6)


@pytest.mark.parametrize(
    ("fields", "memory", "named"),
    [
        ({"max_length": 2**31 - 1}, 1 << 30, "positions"),
        ({"batch_size": 4096, "max_length": 64}, 1 << 26, "batch_size x max_length"),
        ({"clients": 64, "max_micros": 64, "max_length": 64}, 1 << 21, "max_micros"),
    ],
)
async def test_a_job_that_can_never_fit_is_refused_when_it_is_made(
    world: World, fields: dict[str, Any], memory: int, named: str
) -> None:
    world.host.memory_bytes = memory
    with pytest.raises(UsageError, match=named):
        await world.create(config_of(**fields))
    assert world.extension.jobs == []
    await world.create(config_of())


def test_sizes_that_no_message_can_say_are_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size: .*4096"):
        JobConfig.parse({"batch_size": 4097})
    assert JobConfig.parse({"batch_size": 4096}).batch_size == 4096
    with pytest.raises(UsageError, match="clients x max_micros may be 4096"):
        JobConfig.parse({"clients": 1024, "max_micros": 5})
    assert JobConfig.parse({"clients": 1024, "max_micros": 4}).clients == 1024
