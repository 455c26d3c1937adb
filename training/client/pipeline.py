"""A client's share of one optimizer step: its micro-batches, several of them under way at once.

While earlier ones are on the wire or at the server, A already runs for the next ones; C and A's backward take them as
they come back. Each has gradients of its own, which are added in the order of the micro-batches when all are there, so
that timing changes nothing in the result.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from split_llama.errors import BadStates, NonFiniteStates, ServerFault, UnknownStep, UsageError
from split_llama.wire.frame import Kind
from split_llama.wire.training import Backward, Forward
from training.client.exchange import Exchange
from training.client.maths import ClientMaths, Judged, Place, Sent
from training.compute.batch import Batch

T = TypeVar("T")

# The adapters of A and C as they are when it is called, in the thread that computes.
Weights = Callable[[], Mapping[str, Tensor]]

# What costs one micro-batch and nothing else.
MICRO_FAULTS = (NonFiniteStates, BadStates, ServerFault, UnknownStep)


class Compute(Protocol):
    """Runs something in the one thread that computes, first in, first out."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Give what `work` returns."""
        ...


class Batches(Protocol):
    """A client's data, cut into micro-batches without end."""

    def batch(self, index: int) -> Batch:
        """Give micro-batch `index`, a pure function of it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Micro:
    """What became of one micro-batch; without gradients it adds nothing, and `fault` says why."""

    loss: float | None
    batch: Batch
    grads: Mapping[str, Tensor] | None
    fault: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A client's share of a step: `loss` is the sum over `targets`, `None` if one of its micro-batches has none."""

    loss: float | None
    targets: int
    tokens: int
    samples: int
    grads: dict[str, Tensor] | None
    faults: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Verdict:
    """What is known of a share once all its gradients went back, before their answers are here: `told` hears it."""

    missing: int
    told: Callable[[Verdict], None]
    loss: float | None = 0.0
    targets: int = 0
    samples: int = 0

    def add(self, loss: float | None, batch: Batch) -> None:
        """Add a micro-batch that went back, or without a loss one that adds nothing."""
        self.missing -= 1
        if loss is None:
            self.loss = None
        else:
            self.loss = None if self.loss is None else self.loss + loss
            self.targets += batch.target_count
            self.samples += len(batch.ragged.lengths)
        if not self.missing:
            self.told(self)


class Pipeline:
    """Runs shares. `max_micros` micro-batches are under way at most, and none has more than `max_rows` rows."""

    def __init__(
        self, maths: ClientMaths, batches: Batches, compute: Compute, client: str, *, max_micros: int, max_rows: int
    ) -> None:
        self._maths = maths
        self._batches = batches
        self._compute = compute
        self._client = client
        self._window = asyncio.Semaphore(max_micros)
        self._max_rows = max_rows

    async def share(
        self,
        exchange: Exchange,
        step: int,
        cursor: int,
        micros: int,
        weights: Weights,
        told: Callable[[Verdict], None],
    ) -> Share:
        """Do micro-batches `cursor` to `cursor + micros - 1` of the data as those of `step`. Raises `FlLlamaError`.

        `told` hears when all that the server needs of B's part is on its way.
        """
        verdict = Verdict(micros, told)
        adapter = await self._compute(lambda: self._maths.adapter(weights()))
        tasks: list[asyncio.Task[Micro]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for micro in range(micros):
                    place = Place(self._client, step, micro)
                    job = _Job(exchange, place, cursor + micro, micros, adapter, weights, verdict)
                    tasks.append(group.create_task(self._micro(job)))
        except ExceptionGroup as failures:
            raise _first(failures) from failures
        return await self._compute(lambda: add_up([task.result() for task in tasks]))

    async def _micro(self, job: _Job) -> Micro:
        async with self._window:
            batch = await self._compute(lambda: self._batches.batch(job.index))
            if len(batch.token_ids) > self._max_rows:
                raise UsageError(
                    f"a micro-batch has {len(batch.token_ids)} tokens, the server takes {self._max_rows}; "
                    "make the job with a smaller batch_size or max_length"
                )
            try:
                sent, judged = await self._there(job, batch)
            except MICRO_FAULTS as fault:
                job.verdict.add(None, batch)
                return Micro(None, batch, None, fault.message)
            try:
                return await self._back(job, batch, sent, judged)
            except MICRO_FAULTS as fault:
                return Micro(None, batch, None, fault.message)

    async def _there(self, job: _Job, batch: Batch) -> tuple[Sent, Judged]:
        maths, exchange, place = self._maths, job.exchange, job.place
        sent: Sent = await self._compute(lambda: maths.forward(batch, job.weights(), job.adapter, place))
        header = Forward(
            generation=exchange.generation,
            step=place.step,
            micro=place.micro,
            of=job.of,
            targets=batch.target_count,
            lengths=batch.ragged.lengths,
        )
        answer = await exchange.ask(Kind.FORWARD, header, maths.codec, sent.data)
        return sent, await self._compute(lambda: maths.loss(sent, answer, place))

    async def _back(self, job: _Job, batch: Batch, sent: Sent, judged: Judged) -> Micro:
        maths, exchange, place = self._maths, job.exchange, job.place
        back = Backward(generation=exchange.generation, step=place.step, micro=place.micro)
        if judged.data is None:
            exchange.tell(Kind.BACKWARD, back)
            job.verdict.add(None, batch)
            return Micro(None, batch, None, "the loss or its gradient is no finite number")
        answer = exchange.post(Kind.BACKWARD, back, maths.gradient_codec, judged.data)
        job.verdict.add(judged.loss, batch)
        returned = await answer
        grads = await self._compute(lambda: maths.backward(sent, returned))
        return Micro(judged.loss, batch, grads)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One micro-batch to do: its place, its number in the data, and the weights to do it with."""

    exchange: Exchange
    place: Place
    index: int
    of: int
    adapter: str
    weights: Weights
    verdict: Verdict


def add_up(micros: Sequence[Micro]) -> Share:
    """Add micro-batches in their order. Those without gradients count neither tokens nor samples."""
    good = [micro for micro in micros if micro.grads is not None]
    total: dict[str, Tensor] | None = None
    for micro in good:
        assert micro.grads is not None, "the good ones have gradients"
        if total is None:
            total = {name: grad.clone() for name, grad in micro.grads.items()}
        else:
            for name, grad in micro.grads.items():
                total[name] += grad
    losses = [micro.loss for micro in micros if micro.loss is not None]
    return Share(
        loss=math.fsum(losses) if len(losses) == len(micros) else None,
        targets=sum(micro.batch.target_count for micro in good),
        tokens=sum(micro.batch.ragged.rows for micro in good),
        samples=sum(len(micro.batch.ragged.lengths) for micro in good),
        grads=total,
        faults=tuple(micro.fault for micro in micros if micro.fault),
    )


def _first(failures: BaseExceptionGroup[Any]) -> BaseException:
    """Give the first failure of a group, however deep it lies."""
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
