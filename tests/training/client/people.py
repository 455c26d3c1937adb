"""Clients of a job beside a fake server, all in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_client.addresses import Addresses
from edge_client.connector import Connector
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.noise import NoiseScope, NoiseSpec
from split_llama.transport.inprocess import InProcessTransport
from split_llama.wire.training import Join, Joined
from tests.training.client.fake_job import FakeJob
from training.client.generation import Member
from training.client.link import JobLink
from training.client.loop import JobLoop
from training.client.maths import ClientMaths
from training.client.pipeline import Pipeline
from training.client.privacy import GradientNoise, GradientSpec, StateNoise
from training.client.report import StepRecord
from training.client.state import ClientState
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.job_config import JobConfig
from training.strategy import make_strategy

SECRET = bytes(range(32))
PATIENCE = 60.0
STRATEGIES = [
    {"strategy": "client-batch"},
    {"strategy": "sequential"},
    {"strategy": "client-batch", "shared": "A,B,C"},
    {"strategy": "sequential", "shared": "A,B,C", "turn_steps": 2},
]


def job(**changes: Any) -> JobConfig:
    """A small job in fp32."""
    raw = {
        "clients": 2,
        "steps": 4,
        "batch_size": 2,
        "checkpoint_every": 2,
        "codec": "fp32",
        "gradient_codec": "fp32",
        "lora": {"r": 2, "alpha": 4},
        "optimizer": {"lr": 0.01, "schedule": "constant", "max_grad_norm": None},
    }
    return JobConfig.parse(raw | changes)


@dataclass
class Texts:
    """Micro-batches of random tokens, each a function of its number; `bad` ones have what makes the loss NaN."""

    seed: int
    batch_size: int = 2
    taken: list[int] = field(default_factory=list)

    def batch(self, index: int) -> Batch:
        self.taken.append(index)
        draw = random.Random(f"{self.seed} {index}")
        texts = [[1, *(draw.randrange(4, 300) for _ in range(draw.randint(3, 9)))] for _ in range(self.batch_size)]
        return Batch.of(texts, [[-100, -100, *text[2:]] for text in texts])


@dataclass
class Notes:
    """A watcher that remembers."""

    records: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        self.records.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Someone:
    """A client in this event loop."""

    def __init__(
        self,
        fake: FakeJob,
        name: str,
        folder: Path,
        *,
        noise: NoiseSpec = NoiseSpec(0.0),  # noqa: B008 - a value
        gradients: GradientSpec = GradientSpec(),  # noqa: B008 - a value
        reconnect_seconds: float = 20.0,
    ) -> None:
        config, checkpoint = fake.config, Checkpoint.open(fake.folder)
        self.fake, self.name, self.config = fake, name, config
        self.reconnect_seconds = reconnect_seconds
        partition = Partition.parse(config.partition)
        ends = Ends.load(checkpoint, partition, config.lora.config, config.lora.segments)
        scope = NoiseScope("m" * 64, "", BlockRange(1, 3), fake.width, noise, "float32")
        self.maths = ClientMaths(
            ends,
            config,
            StateNoise(noise, scope, SECRET, 1),
            GradientNoise(gradients, SECRET, "job"),
            fake.width,
        )
        self.strategy = make_strategy(config)
        owns = not config.shares_all or self.strategy.own_sets
        first = ends.first_weights(config.seed)
        self.state = ClientState(first, config, owns_optimizer=owns, folder=folder / name, owner=f"job {name}")
        self.texts = Texts(int.from_bytes(name.encode(), "little"), config.batch_size)
        self.watcher = Notes()
        self.member: Member | None = None
        self.link: JobLink | None = None
        self.compute: Callable[..., Any] | None = None

    async def run(self) -> str:
        transport = InProcessTransport(self.fake.accept)
        connector = Connector(Addresses(("http://fake:1",)), lambda address: [transport])
        event_loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as executor:

            def compute(work: Callable[[], Any], /) -> asyncio.Future[Any]:
                return event_loop.run_in_executor(executor, work)

            self.compute = compute

            def member(joined: Joined) -> tuple[Member, Pipeline]:
                self.member = Member(joined.index, self.config, self.strategy, self.state, compute, self.fake.width)
                pipeline = Pipeline(
                    self.maths,
                    self.texts,
                    compute,
                    self.name,
                    max_micros=joined.max_micros,
                    max_rows=joined.max_rows,
                )
                return self.member, pipeline

            self.link = JobLink(connector, self._join, reconnect_seconds=self.reconnect_seconds, adapter_rows=1000)
            try:
                async with self.link:
                    self.loop = JobLoop(self.link, member, self.watcher)
                    return await self.loop.run()
            finally:
                await transport.aclose()

    async def _join(self) -> Join:
        assert self.compute is not None, "it runs"
        have = await self.compute(self.state.have)
        return Join(
            job="job",
            key="key",
            client=self.name,
            secret="a" * 64,
            blocks=(1, 3),
            samples=10,
            have=have,
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.state.weights.items()}


@contextlib.asynccontextmanager
async def running(*people: Someone) -> AsyncIterator[list[asyncio.Task[str]]]:
    """Run clients as tasks for a block."""
    tasks = [asyncio.create_task(someone.run(), name=someone.name) for someone in people]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def to_the_end(*people: Someone) -> list[str]:
    """Run clients until the job is done."""
    async with asyncio.timeout(PATIENCE), running(*people) as tasks:
        return list(await asyncio.gather(*tasks))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Say whether two sets of weights are equal to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def all_weights(fake: FakeJob, people: Sequence[Someone]) -> list[dict[str, Tensor]]:
    """All weights of a job: B's, then each client's."""
    shared = {name: weight.detach().clone() for name, weight in fake.optimizer.weights.items()}
    return [shared, *(someone.weights() for someone in people)]


async def undisturbed(model: Path, folder: Path, **config: Any) -> list[dict[str, Tensor]]:
    fake = FakeJob(model, job(**config))
    people = [Someone(fake, name, folder) for name in ("ann", "bob")]
    assert await to_the_end(*people) == ["the job is done"] * 2
    return all_weights(fake, people)


def equal(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return all(same(a, b) for a, b in zip(left, right, strict=True))


async def true_after(action: Any) -> bool:
    await action
    return True
