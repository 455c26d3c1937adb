"""A server's extension on a host as simple as can be, and clients that do what they are told: all in one process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.errors import FlLlamaError, ModelMismatch, ServerUnreachable, Unauthenticated
from split_llama.layers import Segment
from split_llama.load import load_segment
from split_llama.lora import parse_adapter
from split_llama.wire.codec import Codec, decode_rows, encode_rows, row_bytes
from split_llama.wire.control import Payload, error_from_frame
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.training import (
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
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.compute.lora import leaves_of, take_gradients
from training.compute.optimizer import AdapterOptimizer
from training.compute.schedule import learning_rate
from training.compute.tape import finish
from training.job_config import JobConfig, LoraPart, OptimizerPart
from training.server.extension import TrainingExtension
from training.server.job import Job
from training.strategy import averages, checkpoint_due, contributors, make_strategy

T = TypeVar("T")
CPU = torch.device("cpu")
MAX_FRAME = 4096


class FakeCounter:
    def __init__(self, counts: Counter[str], name: str) -> None:
        self._counts, self._name = counts, name

    def inc(self, amount: float = 1) -> None:
        self._counts[self._name] += int(amount)


class FakeHost:
    """Runs works in one thread, first in, first out. `held` keeps them from running while it is set."""

    def __init__(self, folder: Path, files: Path, memory_bytes: int = 1 << 30) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.blocks = BlockRange(1, self.checkpoint.config.num_hidden_layers - 1)
        self.folder = files
        self.memory_bytes = memory_bytes
        self.plugins: tuple[str, ...] = ()
        self.model = "tiny"
        self.device = CPU
        self.max_frame_bytes = MAX_FRAME
        self.is_ready = True
        self.counts: Counter[str] = Counter()
        self.gauges: dict[str, Callable[[], float]] = {}
        self.works = 0
        self._threads = ThreadPoolExecutor(1)
        self._segments: dict[torch.dtype, Segment] = {}

    def authenticate(self, authorization: str | None) -> str:
        if authorization is None:
            raise Unauthenticated("no key")
        return authorization.removeprefix("Bearer ")

    async def check_model(
        self, blocks: BlockRange, geometry: str | None, weights: str | None, tokenizer: str | None
    ) -> None:
        await asyncio.sleep(0)
        if not self.is_ready:
            raise ServerUnreachable("loading")
        if tokenizer is not None and tokenizer != "0" * 64:
            raise ModelMismatch("the tokenizers differ")

    def dense_segment(self, dtype: torch.dtype) -> Segment:
        if dtype not in self._segments:
            self._segments[dtype] = load_segment(self.checkpoint, self.blocks, dtype=dtype, device=CPU)
        return self._segments[dtype]

    async def compute(self, work: Generator[None, None, T]) -> T:
        self.works += 1
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, work)

    @staticmethod
    def _run(work: Generator[None, None, T]) -> T:
        # As the real one: the thread of inference.
        with torch.inference_mode():
            return finish(work)

    async def in_background(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return FakeCounter(self.counts, name)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.gauges[name] = read

    def close(self) -> None:
        self._threads.shutdown()


def batches(name: str, vocab: int, sizes: Sequence[int] = (5, 3), length: int = 9) -> Callable[[int], Batch]:
    """Micro-batch by number: random tokens, the last half of each to be learned; lengths differ between clients."""

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + index)
        ids, labels = [], []
        for number, size in enumerate(sizes):
            count = size + (index + number + len(name)) % (length - size)
            tokens = torch.randint(4, vocab, (count,), generator=generator).tolist()
            ids.append(tokens)
            labels.append([-100] * (count // 2) + tokens[count // 2 :])
        return Batch.of(ids, labels)

    return batch


@dataclass(frozen=True)
class Snapshot:
    state: Mapping[str, Tensor]
    cursor: int


@dataclass
class Client:
    """A client that can be told to misbehave: `spoil(client, message)` may change what it is about to send."""

    world: World
    name: str
    job: Job
    key: str
    data: Callable[[int], Batch]
    spoil: Callable[[Client, Message], Message | None] = lambda client, message: message
    index: int = -1
    outcomes: list[Outcome] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    errors: list[FlLlamaError] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    reason: str | None = None
    keeps_window: bool = True

    def __post_init__(self) -> None:
        config = self.job.record.config
        self.config, self.strategy = config, make_strategy(config)
        self.ends = self.world.ends(config)
        self.owns = not config.shares_all or self.strategy.own_sets
        first = self.ends.first_weights(config.seed)
        self.optimizer = AdapterOptimizer(first, config.optimizer) if first else None
        self.first = Snapshot(self._state(), 0)
        self.live: dict[int, Snapshot] = {0: self.first}
        self.saved: dict[int, Snapshot] = {}
        self.cursor = 0
        self.inbox: asyncio.Queue[Message | Joined | tuple[int, FlLlamaError]] = asyncio.Queue()
        self.seq = 0
        self.waiting: dict[Any, asyncio.Future[Any]] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self.work: asyncio.Task[None] | None = None
        self.guest: Any = None
        self.generation = 0
        self.window = asyncio.Semaphore(config.max_micros if self.keeps_window else 1000)

    # Life

    def start(self) -> Client:
        self.connect()
        self.tasks = [asyncio.create_task(self._pump())]
        return self

    def connect(self) -> None:
        self.assembler = Assembler(self.world.width, 1 << 20)
        have = tuple(sorted({*self.live, *self.saved}))[-16:]
        blocks = self.job.record.config.blocks(self.world.config.num_hidden_layers)
        join = Join(
            job=self.job.record.id,
            key=self.key,
            client=self.name,
            secret=self.name.encode().hex().ljust(64, "0"),
            blocks=(blocks.start, blocks.stop),
            samples=10,
            generation=self.generation,
            have=have,
        )
        self.seq += 1
        frame = Frame(Kind.JOIN, handle=1, seq=self.seq, payload=join.to_bytes())
        inbox = self.inbox
        self.guest = self.world.extension.join(frame, "somebody", lambda sent: self._receive(sent, inbox))

    def drop(self) -> None:
        """Lose the connection; the process lives on."""
        if self.work is not None:
            self.work.cancel()
        self.guest.detach()

    async def kill(self) -> None:
        """Lose everything that is not on the disk."""
        self.drop()
        await self.stop()
        self.live = {}
        self.inbox = asyncio.Queue()

    async def stop(self) -> None:
        for task in [*self.tasks, *([self.work] if self.work else [])]:
            task.cancel()
        await asyncio.gather(*self.tasks, *([self.work] if self.work else []), return_exceptions=True)

    def again(self) -> Client:
        """Come back after `drop` or `kill`."""
        self.connect()
        if not self.tasks or self.tasks[0].done():
            self.tasks = [asyncio.create_task(self._pump())]
        return self

    async def ended(self) -> str:
        await self.tasks[0]
        assert self.reason is not None
        return self.reason

    def _receive(
        self, sent: Frame | Iterator[Frame], inbox: asyncio.Queue[Message | Joined | tuple[int, FlLlamaError]]
    ) -> None:
        for frame in (sent,) if isinstance(sent, Frame) else sent:
            self._receive_frame(frame, inbox)

    def _receive_frame(self, frame: Frame, inbox: asyncio.Queue[Message | Joined | tuple[int, FlLlamaError]]) -> None:
        if frame.kind is Kind.JOIN:
            inbox.put_nowait(Joined.from_bytes(frame.payload))
        elif frame.kind is Kind.ERROR:
            inbox.put_nowait((frame.seq, error_from_frame(frame)))
        else:
            # As on the wire: nothing is shared with the sender.
            copied = Frame.decode(frame.encode())
            message = self.assembler.add(copied)
            if message is not None:
                inbox.put_nowait(message)

    async def _pump(self) -> None:
        while True:
            event = await self.inbox.get()
            if isinstance(event, Joined):
                self.index = event.index
            elif isinstance(event, tuple):
                self._refused(*event)
            elif event.kind is Kind.RESYNC:
                await self._begin(Start.from_bytes(event.header), event)
            elif event.kind is Kind.CLOSE:
                self.reason = End.from_bytes(event.header).reason
                if self.work is not None:
                    self.work.cancel()
                return
            elif event.kind is Kind.REPLY:
                self._outcome(Outcome.from_bytes(event.header), event)
            else:
                self._answered(event)

    def _refused(self, seq: int, error: FlLlamaError) -> None:
        self.errors.append(error)
        future = self.waiting.pop(seq, None)
        if future is not None and not future.done():
            future.set_exception(error)

    def _answered(self, message: Message) -> None:
        future = self.waiting.pop(message.seq, None)
        if future is not None and not future.done():
            future.set_result(message)

    # Steps

    async def _begin(self, start: Start, message: Message) -> None:
        if self.work is not None:
            self.work.cancel()
            await asyncio.gather(self.work, return_exceptions=True)
        self.starts.append(start)
        self.generation = start.generation
        self._restore(start.step if start.restore else max({0, *self.live, *self.saved}))
        if message.count and self.optimizer is not None:
            self.optimizer.replace(self._tensors(message))
        self.live = {step: each for step, each in self.live.items() if step < start.step}
        self.saved = {step: each for step, each in self.saved.items() if step <= start.step}
        self.live[start.step] = self._now()
        self.closed = start.step
        self.done: dict[int, asyncio.Event] = {}
        self.work = asyncio.create_task(self._steps(start))

    def _restore(self, step: int) -> None:
        snapshot = self.live.get(step) or self.saved.get(step) or (self.first if step == 0 else None)
        assert snapshot is not None, f"{self.name} has no state of step {step}"
        if self.optimizer is not None:
            self.optimizer.load(snapshot.state)
        self.cursor = snapshot.cursor

    async def _steps(self, start: Start) -> None:
        for step in range(start.step + 1, self.config.steps + 1):
            if self.closed >= step:
                continue
            mine = self.index in contributors(self.strategy, step, frozenset(start.present))
            if mine:
                share = asyncio.ensure_future(self._share(step))
                over = asyncio.ensure_future(self._event(step).wait())
                try:
                    await asyncio.wait((share, over), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    share.cancel()
                    over.cancel()
                    await asyncio.wait((share, over))
                if share.done() and not share.cancelled():
                    share.result()
            await self._event(step).wait()

    def _event(self, step: int) -> asyncio.Event:
        return self.done.setdefault(step, asyncio.Event())

    async def _share(self, step: int) -> None:
        of = self.config.accumulate
        tasks = [self._micro(step, micro, self.cursor + micro) for micro in range(of)]
        results = await asyncio.gather(*tasks)
        good = [result for result in results if result is not None]
        losses, targets = sum(loss for loss, _, _ in good), sum(count for _, count, _ in good)
        grads: dict[str, Tensor] = {}
        for _, _, part in good:
            grads = {name: grads[name] + part[name] if grads else part[name] for name in part}
        rows = self._conclude(step, grads, targets)
        self.cursor += of
        if self.owns and not (self.config.shares_all and averages(self.config, self.strategy, step)):
            # The own share is done; what becomes of the step may be heard only after a new connection.
            self.live[step] = self._now()
        self.losses[step] = losses / targets if targets else float("nan")
        samples = of * self.config.batch_size
        commit = Commit(
            generation=self.generation,
            step=step,
            samples=samples,
            targets=targets,
            loss=losses if len(good) == of else None,
        )
        self.send(Kind.STEP, commit, Codec.FP32, rows)

    def _conclude(self, step: int, grads: Mapping[str, Tensor], targets: int) -> bytes:
        if self.optimizer is None:
            return b""
        zeros = {name: torch.zeros_like(weight) for name, weight in self.optimizer.weights.items()}
        if not self.owns:
            return self._rows(grads or zeros)
        if targets:
            rate = learning_rate(self.config.optimizer, step, self.config.steps)
            self.optimizer.step({name: grad / targets for name, grad in grads.items()}, rate)
        if self.config.shares_all and averages(self.config, self.strategy, step):
            return self._rows(self.optimizer.weights)
        return b""

    async def _micro(self, step: int, micro: int, cursor: int) -> tuple[float, int, dict[str, Tensor]] | None:
        async with self.window:
            return await self._there_and_back(step, micro, cursor)

    async def _there_and_back(self, step: int, micro: int, cursor: int) -> tuple[float, int, dict[str, Tensor]] | None:
        batch = self.data(cursor)
        leaves = leaves_of(self.optimizer.weights) if self.optimizer is not None else {}
        states, tape = self.ends.forward_a(batch, leaves, None)
        header = Forward(
            generation=self.generation,
            step=step,
            micro=micro,
            of=self.config.accumulate,
            targets=batch.target_count,
            lengths=batch.ragged.lengths,
        )
        try:
            answer = await self.ask(Kind.FORWARD, header, encode_rows(Codec.FP32, states.numpy()))
            loss = self.ends.loss(self._values(answer, len(states)), batch, leaves, None)
            back = Backward(generation=self.generation, step=step, micro=micro)
            answer = await self.ask(Kind.BACKWARD, back, encode_rows(Codec.FP32, loss.grad.numpy()))
        except FlLlamaError:
            return None
        self.ends.backward_a(tape, self._values(answer, len(states)))
        return loss.loss_sum, loss.targets, take_gradients(leaves)

    def _outcome(self, outcome: Outcome, message: Message) -> None:
        if outcome.generation != self.generation:
            return
        self.outcomes.append(outcome)
        if message.count and self.optimizer is not None:
            self.optimizer.replace(self._tensors(message))
        if message.count or outcome.step not in self.live:
            self.live[outcome.step] = self._now()
        for old in sorted(self.live)[:-3]:
            del self.live[old]
        if checkpoint_due(self.config, outcome.step):
            self.saved[outcome.step] = self.live[outcome.step]
            for old in sorted(self.saved)[:-2]:
                del self.saved[old]
        self.closed = outcome.step
        self._event(outcome.step).set()

    # Wire

    async def ask(self, kind: Kind, header: Payload, rows: bytes) -> Message:
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.waiting[self.seq + 1] = future
        self.send(kind, header, Codec.FP32, rows)
        return await future

    def send(self, kind: Kind, header: Payload, codec: Codec = Codec.FP32, rows: bytes = b"") -> None:
        self.seq += 1
        count = len(rows) // row_bytes(codec, self.world.width)
        message = self.spoil(self, Message(kind, self.seq, header.model_dump_json().encode(), codec, count, rows))
        if message is not None:
            self.post(message)

    def post(self, message: Message) -> None:
        for frame in cut(message, 1, self.world.width, MAX_FRAME):
            try:
                self.guest.receive(Frame.decode(frame.encode()))
            except FlLlamaError as error:
                self._refused(message.seq, error)
                return

    def _values(self, message: Message, rows: int) -> Tensor:
        values = np.empty((rows, self.world.width), np.float32)
        decode_rows(message.codec, message.rows, values)
        return torch.from_numpy(values)

    def _rows(self, tensors: Mapping[str, Tensor]) -> bytes:
        values = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        return encode_rows(Codec.FP32, flatten(values, self.world.width))

    def _tensors(self, message: Message) -> dict[str, Tensor]:
        assert self.optimizer is not None
        shapes = {name: tuple(weight.shape) for name, weight in self.optimizer.weights.items()}
        values = unflatten(self._values(message, message.count).numpy(), shapes)
        return {name: torch.from_numpy(value.copy()) for name, value in values.items()}

    def _state(self) -> dict[str, Tensor]:
        return self.optimizer.tensors() if self.optimizer is not None else {}

    def _now(self) -> Snapshot:
        return Snapshot(self._state(), self.cursor)

    @property
    def weights(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return {name: weight.detach().clone() for name, weight in self.optimizer.weights.items()}


class World:
    """A model, a server that can be restarted, and its clients."""

    def __init__(self, folder: Path, files: Path, **extension: Any) -> None:
        self.folder, self.files = folder, files
        self.options = extension
        self.host = FakeHost(folder, files)
        self.config = self.host.checkpoint.config
        self.width = self.config.hidden_size
        self.extension = TrainingExtension(self.host, **extension)
        self.clients: list[Client] = []
        self._ends: dict[Any, Ends] = {}

    def ends(self, config: JobConfig) -> Ends:
        key = (config.partition, config.lora)
        if key not in self._ends:
            partition = Partition.parse(config.partition)
            self._ends[key] = Ends.load(self.host.checkpoint, partition, config.lora.config, config.lora.segments)
        return self._ends[key]

    async def create(self, config: JobConfig, owner: str = "somebody") -> tuple[Job, str]:
        return await self.extension.create(config.model_dump(mode="json"), owner)

    def client(self, name: str, job: Job, key: str, **options: Any) -> Client:
        client = Client(self, name, job, key, batches(name, self.config.vocab_size), **options)
        self.clients.append(client)
        return client

    async def restart(self, host: FakeHost | None = None) -> None:
        """Close the server, and start another on the same files."""
        await self.extension.close()
        self.host.close()
        self.host = host or FakeHost(self.folder, self.files)
        self.extension = TrainingExtension(self.host, **self.options)
        await self.extension.start()

    async def close(self) -> None:
        for client in self.clients:
            await client.stop()
        await self.extension.close()
        self.host.close()


def config_of(**fields: Any) -> JobConfig:
    """A small job in fp32. AdamW makes much of gradients that are next to nothing, unless eps is larger than usual."""
    plain: dict[str, Any] = {
        "codec": "fp32",
        "gradient_codec": "fp32",
        "batch_size": 2,
        "max_length": 32,
        "steps": 4,
        "seed": 3,
        "shared": "A,B,C",
        "lora": LoraPart(r=4, alpha=8.0),
        "optimizer": OptimizerPart(lr=1e-2, weight_decay=0.01, schedule="linear", eps=1e-5),
    }
    return JobConfig(**(plain | fields))


async def begin(world: World, config: JobConfig, **options: Any) -> tuple[Job, list[Client]]:
    """Create a job and have all its clients join it."""
    job, key = await world.create(config)
    clients = [world.client(f"client-{number}", job, key, **options).start() for number in range(config.clients)]
    return job, clients


async def train(world: World, config: JobConfig, **options: Any) -> tuple[Job, list[Client]]:
    """Begin, and wait for the end."""
    job, clients = await begin(world, config, **options)
    for client in clients:
        assert await client.ended() == "done"
    return job, clients


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of tests
            await asyncio.sleep(0.002)


async def adapters(job: Job) -> dict[str, Tensor]:
    """What the server's set, or average, is now."""
    return dict(parse_adapter(await job.keeper.adapter(), "the job").tensors)


def close_to(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        largest = float((tensor - right[name]).abs().max())
        assert largest <= tolerance, (name, largest)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def names_of(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"client-{number}"
