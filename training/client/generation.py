"""A client's work between one Start of its job and the next: its share of each step whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from split_llama.errors import CacheError, NonFiniteStates
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.frame import Kind
from split_llama.wire.training import Commit, Message, Outcome, Start, flatten, unflatten
from training.client.exchange import Exchange
from training.client.pipeline import Compute, Pipeline, Share, Verdict
from training.client.state import ClientState
from training.job_config import JobConfig
from training.strategy import Strategy, averages, checkpoint_due, contributors


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """What a client is in a job, whichever generation: its number, the job's rules, and its own state."""

    index: int
    config: JobConfig
    strategy: Strategy
    state: ClientState
    compute: Compute
    width: int

    def owns_optimizer(self) -> bool:
        """Say whether the client steps A's and C's adapters itself."""
        return not self.config.shares_all or self.strategy.own_sets

    def averages(self, step: int) -> bool:
        """Say whether A's and C's adapters are averaged with others' after a step."""
        return self.config.shares_all and averages(self.config, self.strategy, step)

    def needs_outcome(self, step: int) -> bool:
        """Say whether the weights after a step come from the server."""
        return self.config.shares_all and (not self.strategy.own_sets or self.averages(step))

    def weights_of(self, message: Message) -> dict[str, Tensor] | None:
        """Read A's and C's adapters out of a message; `None` where it has none. Raises `BadStates`."""
        if not message.count:
            return None
        rows = np.empty((message.count, self.width), np.float32)
        decode_rows(message.codec, message.rows, rows)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.weights.items()}
        return {name: torch.from_numpy(value.copy()) for name, value in unflatten(rows, shapes).items()}


@dataclass(frozen=True, slots=True, eq=False)
class Closed:
    """What became of a step: the server's word, this client's share if it had one, and warnings."""

    outcome: Outcome
    share: Share | None
    warnings: tuple[str, ...] = ()


class Generation:
    """The work after one Start. `run` goes on to the job's last step; `close` takes what the server says of each."""

    def __init__(self, member: Member, pipeline: Pipeline, exchange: Exchange, start: Start) -> None:
        self.exchange = exchange
        self._member = member
        self._pipeline = pipeline
        self._start = start
        self._present = frozenset(start.present)
        self._shares: dict[int, Share] = {}
        self._under_way: tuple[int, asyncio.Task[None] | None] = (0, None)
        # Shares that the server has all of, while the client still steps what is its own.
        self._concluding: dict[int, asyncio.Task[None]] = {}
        self._closed = self._committed = start.step
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Do the shares of all steps to come. Raises `FlLlamaError`."""
        member = self._member
        for step in range(self._start.step + 1, member.config.steps + 1):
            if member.index in contributors(member.strategy, step, self._present) and step > self._closed:
                await self._contribute(step)
            if member.needs_outcome(step):
                await self._until_closed(step)

    async def close(self, outcome: Outcome, message: Message) -> Closed:
        """Take the outcome of a step: abandon what is under way for it, confirm the state, keep it if that is due."""
        member, step = self._member, outcome.step
        under_way, task = self._under_way
        if under_way == step and task is not None:
            task.cancel()  # The step was closed without this client.
        if (concluding := self._concluding.pop(step, None)) is not None:
            self.exchange.give_up(step)
            await asyncio.wait({concluding})
        weights = member.weights_of(message)
        await member.compute(lambda: member.state.confirm(step, weights))
        self._closed = max(self._closed, step)
        self._changed.set()
        warnings: tuple[str, ...] = ()
        if checkpoint_due(member.config, step, member.strategy):
            try:
                await member.compute(lambda: member.state.save(step))
            except CacheError as full:
                warnings = (f"{full.message}. Training goes on; until this is mended a restart goes further back",)
        return Closed(outcome, self._shares.pop(step, None), warnings)

    async def conclude(self) -> None:
        """Finish the shares that the server has all of and has answered, so that they can be restored."""
        answered = {task for step, task in self._concluding.items() if not self.exchange.waits_for(step)}
        if answered:
            await asyncio.wait(answered)

    async def _until_closed(self, step: int) -> None:
        while self._closed < step:
            self._changed.clear()
            await self._changed.wait()

    async def _contribute(self, step: int) -> None:
        """Do one share; ends early when the step is closed without it."""
        task = asyncio.create_task(self._share(step), name=f"share-of-step-{step}")
        self._under_way = (step, task)
        try:
            await asyncio.wait({task})
        finally:
            self._under_way = (0, None)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not task.cancelled():
            await task

    async def _share(self, step: int) -> None:
        member, state = self._member, self._member.state
        micros = member.config.accumulate
        # Where nothing of A and C is shared, the server need not wait for A's backward: its answer is for the client.
        early = not member.config.shares_all

        def told(verdict: Verdict) -> None:
            # An answer about this step says that the one before is closed; where all fails there may be none.
            if early and self._closed >= step - 1:
                self._commit(step, verdict)

        share = await self._pipeline.share(self.exchange, step, state.cursor, micros, lambda: state.weights, told)
        # What the state is after a step is settled before the next one changes it.
        await self._until_closed(step - 1)
        rows = await member.compute(lambda: self._conclude(step, share))
        self._shares[step] = share
        if self._committed < step:
            self._commit(step, share, rows)

    def _commit(self, step: int, share: Share | Verdict, rows: bytes = b"") -> None:
        """Say that the server has all of this client's share."""
        under_way, task = self._under_way
        if under_way == step and task is not None:
            self._concluding[step] = task
        self._under_way = (0, None)
        self._committed = step
        commit = Commit(
            generation=self.exchange.generation,
            step=step,
            samples=share.samples,
            targets=share.targets,
            loss=share.loss,
        )
        self.exchange.tell(Kind.STEP, commit, Codec.FP32, rows)

    def _conclude(self, step: int, share: Share) -> bytes:
        """Step the own adapters, or hand the gradients over: give the rows of the commit."""
        member, state = self._member, self._member.state
        averaged = member.averages(step)
        state.advance(step, share.grads, share.targets, averaged=averaged)
        if averaged and member.owns_optimizer():
            return self._rows(state.weights)
        if not member.owns_optimizer():
            grads = share.grads or {name: torch.zeros_like(weight) for name, weight in state.weights.items()}
            try:
                return self._rows(grads)
            except NonFiniteStates:
                return self._rows({name: torch.zeros_like(weight) for name, weight in state.weights.items()})
        return b""

    def _rows(self, tensors: Mapping[str, Tensor]) -> bytes:
        values = {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}
        return encode_rows(Codec.FP32, flatten(values, self._member.width))
