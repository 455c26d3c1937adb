"""A job's server as simple as the protocol allows: one micro-batch at a time, at once; faults are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.errors import FlLlamaError
from split_llama.load import load_segment
from split_llama.lora import init_lora
from split_llama.transport.base import Channel, ChannelClosed
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.control import Hello, HelloReply, Payload, error_frame
from split_llama.wire.frame import Frame, Kind, encode_message, split_message
from split_llama.wire.training import (
    Answer,
    Assembler,
    Backward,
    Commit,
    End,
    Forward,
    Join,
    Joined,
    Message,
    Outcome,
    Start,
    cut,
    flatten,
    unflatten,
)
from training.compute.lora import Group
from training.compute.optimizer import AdapterOptimizer
from training.compute.schedule import learning_rate
from training.compute.tape import Tape, Trunk, finish
from training.job_config import JobConfig
from training.strategy import checkpoint_due, contributors, make_strategy

MAX_FRAME = 1 << 16


@dataclass
class Seat:
    """A member on its connection."""

    index: int
    channel: Channel
    handle: int
    have: set[int]

    async def send(self, kind: Kind, header: Payload, width: int, codec: Codec = Codec.FP32, rows: bytes = b"") -> None:
        count = len(rows) // (width * (4 if codec is Codec.FP32 else 2))
        message = Message(kind, 1, header.to_bytes(), codec, count, rows)
        await self.channel.send(encode_message(cut(message, self.handle, width, MAX_FRAME)))


@dataclass
class Part:
    """One micro-batch at the server."""

    header: Forward
    weights: dict[str, Tensor]
    tape: Tape
    void: bool = False


@dataclass
class FakeJob:
    """`hook(seat, message)` sees every message first; it may give `True` for "I have dealt with it"."""

    folder: Path
    config: JobConfig
    max_micros: int = 4
    hook: Callable[[Seat, Message], Any] = lambda seat, message: None
    generation: int = 0
    step: int = 0
    most_in_flight: int = 0
    joins: list[Join] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    ends: bool = True

    def __post_init__(self) -> None:
        checkpoint = Checkpoint.open(self.folder)
        self.model = checkpoint.config
        self.width = self.model.hidden_size
        partition, count = Partition.parse(self.config.partition), self.model.num_hidden_layers
        self.blocks = partition.segment_b(count)
        lora = self.config.lora.config
        segment = load_segment(checkpoint, self.blocks, dtype=torch.float32, device=torch.device("cpu"))
        self.trunk = Trunk(segment, lora)
        self.optimizer = AdapterOptimizer(
            init_lora(self.model, lora, self.blocks, self.config.seed), self.config.optimizer
        )
        self.outer: AdapterOptimizer | None = None
        if self.config.shares_all:
            ends = [partition.segment_a(count), partition.segment_c(count)]
            first = {k: v for part in ends for k, v in init_lora(self.model, lora, part, self.config.seed).items()}
            self.outer = AdapterOptimizer(first, self.config.optimizer)
        self.strategy = make_strategy(self.config)
        self.indices: dict[str, int] = {}
        self.seats: dict[int, Seat] = {}
        self.live: dict[int, list[dict[str, Tensor]]] = {0: self._now()}
        self.saved: dict[int, list[dict[str, Tensor]]] = {0: self.live[0]}
        self._clear()

    def _optimizers(self) -> list[AdapterOptimizer]:
        return [self.optimizer] if self.outer is None else [self.optimizer, self.outer]

    def _now(self) -> list[dict[str, Tensor]]:
        return [optimizer.tensors() for optimizer in self._optimizers()]

    def _clear(self) -> None:
        self.parts: dict[tuple[int, int], Part] = {}
        self.committed: dict[int, tuple[Commit, Mapping[str, Tensor] | None]] = {}
        self.waiting: list[tuple[int, Message]] = []
        self.in_flight: dict[int, set[tuple[int, int]]] = {}

    # --- connections

    async def accept(self, channel: Channel) -> None:
        seat: Seat | None = None
        assembler = Assembler(self.width, 1 << 20)
        try:
            while True:
                for frame in split_message(await channel.receive(), MAX_FRAME):
                    if frame.kind is Kind.HELLO:
                        Hello.from_bytes(frame.payload)
                        await channel.send(Frame(Kind.HELLO, payload=self._greeting().to_bytes()).encode())
                        continue
                    if frame.kind is Kind.CLOSE:
                        await channel.send(Frame(Kind.CLOSE, handle=frame.handle).encode())
                        self.left(seat)
                        continue
                    message = assembler.add(frame)
                    if message is None:
                        continue
                    if message.kind is Kind.JOIN:
                        seat = await self._join(channel, frame.handle, message)
                    elif seat is not None and self.seats.get(seat.index) is seat:
                        await self._message(seat, message)
        except ChannelClosed:
            pass
        finally:
            self.left(seat)

    def left(self, seat: Seat | None) -> None:
        if seat is not None and self.seats.get(seat.index) is seat:
            del self.seats[seat.index]

    def _greeting(self) -> HelloReply:
        return HelloReply(
            protocol=1,
            server="fake",
            model="tiny",
            blocks=(self.blocks.start, self.blocks.stop),
            hidden_size=self.width,
            geometry=self.model.geometry_digest(),
            codecs=("fp32",),
            max_frame_bytes=MAX_FRAME,
            max_message_bytes=1 << 20,
            max_step_rows=512,
            max_model_len=512,
        )

    async def _join(self, channel: Channel, handle: int, message: Message) -> Seat | None:
        join = Join.from_bytes(message.header)
        self.joins.append(join)
        # By name, as a job does it: who is quicker must not decide the order of the sums.
        index = 0 if self.config.clients == 1 else ("ann", "bob").index(join.client)
        seat = Seat(self.indices.setdefault(join.client, index), channel, handle, set(join.have))
        try:
            self.hook(seat, message)
        except FlLlamaError as error:
            await channel.send(error_frame(handle, 0, error).encode())
            return None
        joined = Joined(index=seat.index, max_micros=self.max_micros, max_rows=4096)
        await seat.send(Kind.JOIN, joined, self.width)
        self.seats[seat.index] = seat
        if len(self.seats) == self.config.clients:
            await self._start()
        return seat

    async def _start(self) -> None:
        known = {**self.saved, **self.live}
        common = set.intersection(set(known), *(seat.have for seat in self.seats.values()))
        self.step = max(common)
        for optimizer, tensors in zip(self._optimizers(), known[self.step], strict=True):
            optimizer.load(tensors)
        self.live = {step: state for step, state in self.live.items() if step <= self.step}
        self.generation += 1
        self._clear()
        start = Start(generation=self.generation, step=self.step, present=tuple(sorted(self.seats)))
        for seat in self.seats.values():
            await seat.send(Kind.RESYNC, start, self.width, rows=self._outer_rows())

    def _outer_rows(self) -> bytes:
        if self.outer is None:
            return b""
        return encode_rows(
            Codec.FP32, flatten({k: v.detach().numpy() for k, v in self.outer.weights.items()}, self.width)
        )

    async def crash(self) -> None:
        """Lose everything but the checkpoints, as a killed process does."""
        self.live = {}
        self._clear()
        seats, self.seats = list(self.seats.values()), {}
        for seat in seats:
            await seat.channel.close(1006, "killed")

    async def cut_off(self, index: int) -> None:
        await self.seats.pop(index).channel.close(1006, "cut")

    # --- training

    async def _message(self, seat: Seat, message: Message) -> None:
        if (done := self.hook(seat, message)) is not None:
            if asyncio.iscoroutine(done):
                done = await done
            if done:
                return
        if message.kind is Kind.FORWARD:
            header = Forward.from_bytes(message.header)
            flying = self.in_flight.setdefault(seat.index, set())
            flying.add((header.step, header.micro))
            self.most_in_flight = max(self.most_in_flight, len(flying))
            if header.generation == self.generation:
                self.waiting.append((seat.index, message))
                await self._forwards()
        elif message.kind is Kind.BACKWARD:
            await self._backward(seat, message)
        elif message.kind is Kind.STEP:
            await self._commit(seat, message)

    async def _forwards(self) -> None:
        """Answer what is of the next step; the rest waits."""
        for index, message in list(self.waiting):
            header = Forward.from_bytes(message.header)
            if header.step != self.step + 1 or index not in self.seats:
                continue
            self.waiting.remove((index, message))
            weights = {name: weight.detach().requires_grad_(True) for name, weight in self.optimizer.weights.items()}
            group = Group(header.lengths, weights)
            tape = finish(self.trunk.forward(self._rows(message), [group], keep=True))
            self.parts[index, header.micro] = Part(header, weights, tape)
            await self._answer(index, Kind.FORWARD, header, tape.output)

    async def _answer(self, index: int, kind: Kind, header: Forward | Backward, rows: Tensor) -> None:
        answer = Answer(generation=header.generation, step=header.step, micro=header.micro)
        if (seat := self.seats.get(index)) is not None:
            await seat.send(kind, answer, self.width, rows=encode_rows(Codec.FP32, rows.detach().numpy()))

    def _rows(self, message: Message) -> Tensor:
        rows = np.empty((message.count, self.width), np.float32)
        decode_rows(message.codec, message.rows, rows)
        return torch.from_numpy(rows)

    async def _backward(self, seat: Seat, message: Message) -> None:
        header = Backward.from_bytes(message.header)
        part = self.parts[seat.index, header.micro]
        self.in_flight[seat.index].discard((header.step, header.micro))
        if not message.count:
            part.void = True
            return
        await self._answer(seat.index, Kind.BACKWARD, header, finish(part.tape.backward(self._rows(message))))

    async def _commit(self, seat: Seat, message: Message) -> None:
        commit = Commit.from_bytes(message.header)
        self.commits.append(commit)
        grads = None
        if self.outer is not None:
            shapes = {name: tuple(weight.shape) for name, weight in self.outer.weights.items()}
            values = unflatten(self._rows(message).numpy(), shapes)
            grads = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
        self.committed[seat.index] = (commit, grads)
        present = frozenset(self.seats)
        if len(present) < self.config.clients:
            return  # Whoever is missing is waited for; then everybody starts again.
        if set(self.committed) == contributors(self.strategy, self.step + 1, present):
            await self.close_step()

    async def close_step(self, left_out: frozenset[int] = frozenset()) -> None:
        """Step the optimizers over what was committed, and tell everybody."""
        commits = [self.committed[index] for index in sorted(self.committed)]
        self.step += 1
        targets = sum(commit.targets for commit, _ in commits)
        rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
        good = [self.parts[key] for key in sorted(self.parts) if key[0] in self.committed and not self.parts[key].void]
        if targets:
            self.optimizer.step(_mean([{k: _grad(w) for k, w in part.weights.items()} for part in good], targets), rate)
            if self.outer is not None:
                self.outer.step(_mean([grads for _, grads in commits if grads is not None], targets), rate)
        losses = [commit.loss for commit, _ in commits if commit.loss is not None]
        loss = sum(losses) / targets if losses and targets else None
        if loss is not None:
            self.losses[self.step] = loss
        self.live[self.step] = self._now()
        if checkpoint_due(self.config, self.step):
            self.saved[self.step] = self.live[self.step]
        self.parts, self.committed = {}, {}
        for seat in list(self.seats.values()):
            included = seat.index not in left_out
            outcome = Outcome(
                generation=self.generation, step=self.step, included=included, loss=loss, learning_rate=rate
            )
            await seat.send(Kind.REPLY, outcome, self.width, rows=self._outer_rows())
        if self.step == self.config.steps and self.ends:
            for seat in list(self.seats.values()):
                await seat.send(Kind.CLOSE, End(reason="the job is done"), self.width)
        await self._forwards()


def _grad(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _mean(parts: list[Mapping[str, Tensor]], targets: int) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(value) for name, value in parts[0].items()}
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return {name: value / targets for name, value in total.items()}
