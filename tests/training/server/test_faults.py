"""What misbehaves costs itself: late, lost, repeated, not finite, too large, too many, or somebody else's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from split_llama.errors import (
    BadRequest,
    BadStates,
    FlLlamaError,
    JobEnded,
    LimitExceeded,
    ModelMismatch,
    NonFiniteStates,
    NotOwner,
    PartitionNotAllowed,
    UnknownJob,
    UnknownStep,
    UsageError,
    WindowExceeded,
)
from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.control import error_from_frame
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.training import Backward, Commit, Forward, Join, Message
from tests.training.server.central import Central, joined
from tests.training.server.conftest import MakeWorld
from tests.training.server.world import Client, World, adapters, batches, begin, close_to, config_of, same, train, until
from training.compute.tape import Trunk
from training.job_config import JobConfig, LoraPart, OptimizerPart
from training.server.job import Job

Spoil = Callable[[Client, Message], Message | None]


def scaled(message: Message, factor: float, width: int) -> Message:
    with np.errstate(invalid="ignore"):
        rows = np.frombuffer(message.rows, "<f4").reshape(message.count, width) * np.float32(factor)
    return Message(message.kind, message.seq, message.header, message.codec, message.count, rows.tobytes())


def step_of(message: Message) -> int:
    return int(json.loads(message.header)["step"])


def of(name: str, kind: Kind, change: Callable[[Client, Message], Message | None]) -> Spoil:
    """Change what one client sends of one kind."""

    def spoil(client: Client, message: Message) -> Message | None:
        return change(client, message) if client.name == name and message.kind is kind else message

    return spoil


class Clock:
    """Time that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, world: World, seconds: float) -> None:
        self.now += seconds
        for wake in list(world.extension.budget.listeners):
            wake()


async def train_with_a_late_one(world: World, clock: Clock, config: JobConfig, kind: Kind) -> tuple[Job, list[Client]]:
    """Train three clients, the second of which does not send `kind` in step 2 until it is too late."""
    sent: set[tuple[str, Kind, int]] = set()

    def note(client: Client, message: Message) -> Message | None:
        sent.add((client.name, message.kind, step_of(message)))
        return None if (client.name, message.kind, step_of(message)) == ("client-1", kind, 2) else message

    job, clients = await begin(world, config, spoil=note)
    await until(lambda: all((f"client-{number}", kind, 2) in sent for number in range(3)))
    clock.advance(world, 1.0)
    if config.strategy == "server-hierarchical":
        await until(lambda: all((f"client-{number}", Kind.STEP, 2) in sent for number in (0, 2)))
    clock.advance(world, 100.0)
    for client in clients:
        assert await client.ended() == "done"
    return job, clients


async def test_who_is_late_is_left_out_of_the_step(make_world: MakeWorld) -> None:
    clock = Clock()
    world = await make_world(clock=clock)
    config = config_of(strategy="client-batch", clients=3, deadline_seconds=100.0)
    job, clients = await train_with_a_late_one(world, clock, config, Kind.FORWARD)
    assert [outcome.included for outcome in clients[1].outcomes] == [True, False, True, True]
    assert all(outcome.included for client in (clients[0], clients[2]) for outcome in client.outcomes)
    assert [job.record.tally.member(index).left_out for index in range(3)] == [0, 1, 0]
    central = Central(world, config)
    data = [batches(f"client-{number}", world.config.vocab_size) for number in range(3)]
    cursors = [0, 0, 0]
    for step in range(1, 5):
        there = [0, 2] if step == 2 else [0, 1, 2]
        central.step(step, joined([data[number](cursors[number]) for number in there]))
        for number in there:
            cursors[number] += 1
    close_to(await adapters(job), central.weights, 2e-5)


@pytest.mark.parametrize("kind", [Kind.BACKWARD, Kind.STEP])
@pytest.mark.parametrize("strategy", ["client-batch", "server-hierarchical"])
async def test_who_stays_away_half_way_is_left_out_too(make_world: MakeWorld, strategy: str, kind: Kind) -> None:
    clock = Clock()
    world = await make_world(clock=clock)
    config = config_of(strategy=strategy, clients=3, deadline_seconds=100.0, average_every=2)
    job, clients = await train_with_a_late_one(world, clock, config, kind)
    assert [outcome.included for outcome in clients[1].outcomes] == [True, False, True, True]
    assert all(outcome.included for client in (clients[0], clients[2]) for outcome in client.outcomes)
    weights = await adapters(job)
    for client in clients:
        same(client.weights, {name: weights[name] for name in client.weights})


async def test_with_own_sets_a_slow_client_goes_back_by_itself(world: World) -> None:
    config = config_of(strategy="server-hierarchical", clients=3, average_every=4, steps=4)
    reference, _ = await train(world, config)
    gate = asyncio.Event()
    held: list[tuple[Client, Message]] = []

    def slow(client: Client, message: Message) -> Message | None:
        if step_of(message) != 2 or gate.is_set():
            return message
        held.append((client, message))
        return None

    job, clients = await begin(world, config, spoil=of("client-1", Kind.BACKWARD, slow))
    # The others are answered without it, and go on.
    await until(lambda: {job.step_of(0), job.step_of(2)} == {3})
    assert job.step_of(1) == 1
    gate.set()
    for client, message in held:
        client.post(message)
    for client in clients:
        assert await client.ended() == "done"
    close_to(await adapters(job), await adapters(reference), 5e-6)


async def test_a_repeated_gradient_adds_nothing_and_is_answered_again(world: World) -> None:
    def twice(client: Client, message: Message) -> Message | None:
        client.post(message)
        asyncio.get_running_loop().call_later(0.05, client.post, message)
        return message

    config = config_of(strategy="client-batch", clients=1, steps=3, accumulate=2)
    reference, _ = await train(world, config)
    job, (client,) = await train(world, config, spoil=of("client-0", Kind.BACKWARD, twice))
    same(await adapters(reference), await adapters(job))
    assert {type(error) for error in client.errors} <= {UnknownStep}


async def test_a_kept_answer_is_sent_again(world: World) -> None:
    answers: list[Message] = []
    config = config_of(strategy="client-batch", clients=2, steps=2, shared="B")
    job, clients = await begin(world, config, spoil=of("client-1", Kind.STEP, lambda client, message: None))
    received = clients[0]._answered

    def note(message: Message) -> None:
        answers.append(message)
        received(message)

    clients[0]._answered = note  # type: ignore[method-assign]
    sent: list[Message] = []
    clients[0].spoil = lambda client, message: sent.append(message) or message
    await until(lambda: any(message.kind is Kind.STEP for message in sent))
    back = next(message for message in sent if message.kind is Kind.BACKWARD)
    before = len(answers)
    clients[0].post(back)
    await until(lambda: len(answers) == before + 1)
    assert answers[-1].rows == answers[-2].rows
    assert job.record.step == 0


async def test_gradients_for_what_was_never_sent_are_refused(world: World) -> None:
    _, (client,) = await begin(world, config_of(strategy="client-batch", clients=1, steps=100))
    await until(lambda: len(client.outcomes) > 2)
    rows = encode_rows(Codec.FP32, np.ones((2, world.width), np.float32))
    for step in (1, 90):
        client.send(Kind.BACKWARD, Backward(generation=1, step=step, micro=7), Codec.FP32, rows)
    assert {type(error) for error in client.errors} == {UnknownStep}
    # Of another generation it is nobody's any more.
    client.send(Kind.BACKWARD, Backward(generation=9, step=1, micro=0), Codec.FP32, rows)
    assert len(client.errors) == 2
    client.spoil = lambda client, message: None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_gradients_that_are_not_finite_cost_their_client_alone(world: World, value: float) -> None:
    def poison(client: Client, message: Message) -> Message | None:
        return scaled(message, value, world.width) if step_of(message) == 2 else message

    config = config_of(strategy="client-batch", clients=2)
    job, clients = await train(world, config, spoil=of("client-1", Kind.BACKWARD, poison))
    assert [type(error) for error in clients[1].errors] == [NonFiniteStates]
    assert [outcome.included for outcome in clients[1].outcomes] == [True, False, True, True]
    assert all(outcome.included for outcome in clients[0].outcomes)
    assert [job.record.tally.member(index).skipped for index in range(2)] == [0, 1]
    assert world.host.counts["training_skipped"] == 1
    central = Central(world, config)
    data = [batches(f"client-{number}", world.config.vocab_size) for number in range(2)]
    for step in range(1, 5):
        there = [0] if step == 2 else [0, 1]
        central.step(step, joined([data[number](step - 1) for number in there]))
    close_to(await adapters(job), central.weights, 2e-5)


async def test_a_step_of_nothing_finite_is_skipped_and_the_job_goes_on(world: World) -> None:
    def poison(client: Client, message: Message) -> Message | None:
        return scaled(message, float("nan"), world.width) if step_of(message) == 2 else message

    def spoil(client: Client, message: Message) -> Message | None:
        return poison(client, message) if message.kind is Kind.FORWARD else message

    job, clients = await train(world, config_of(strategy="client-batch", clients=2), spoil=spoil)
    outcome = clients[0].outcomes[1]
    assert outcome.skipped is not None
    assert not outcome.included
    assert job.record.tally.skipped == 1
    assert all(bool(tensor.isfinite().all()) for tensor in (await adapters(job)).values())


async def test_shared_gradients_that_are_not_finite_are_skipped(world: World) -> None:
    def poison(client: Client, message: Message) -> Message | None:
        return scaled(message, float("nan"), world.width) if step_of(message) == 2 else message

    job, clients = await train(
        world, config_of(strategy="client-batch", clients=2), spoil=of("client-1", Kind.STEP, poison)
    )
    assert [outcome.included for outcome in clients[1].outcomes] == [True, False, True, True]
    assert all(bool(tensor.isfinite().all()) for tensor in (await adapters(job)).values())
    same(clients[0].weights, clients[1].weights)


async def test_gradients_a_thousand_times_too_large_are_clipped_and_reported(world: World) -> None:
    optimizer = OptimizerPart(lr=1e-2, eps=1e-5, max_grad_norm=None)
    config = config_of(
        strategy="client-batch", clients=2, shared="B", client_max_grad_norm=2.0, optimizer=optimizer, steps=2
    )
    _, before = await train(world, config.model_copy(update={"client_max_grad_norm": 1e-9}))
    norms = [client.outcomes[0].clipped_from for client in before]
    assert all(norms)

    def large(client: Client, message: Message) -> Message | None:
        return scaled(message, 1000.0, world.width)

    job, clients = await train(world, config, spoil=of("client-1", Kind.BACKWARD, large))
    assert clients[1].outcomes[0].clipped_from == pytest.approx(1000 * norms[1], rel=1e-4)
    assert job.record.tally.member(1).clipped == 2
    assert world.host.counts["training_clipped"] >= 2
    # Together they cannot be longer than what each may be.
    assert clients[0].outcomes[0].gradient_norm <= 2.0 + 1e-5


@pytest.mark.parametrize("aggregation", ["median", "trimmed-mean"])
async def test_robust_aggregation_ignores_one_of_three(world: World, aggregation: str) -> None:
    def large(client: Client, message: Message) -> Message | None:
        return scaled(message, 1000.0, world.width)

    optimizer = OptimizerPart(lr=1e-2, eps=1e-5, max_grad_norm=None)
    fields: dict[str, Any] = {"strategy": "client-batch", "clients": 3, "shared": "B", "steps": 2, "trim": 0.4}
    honest = config_of(**fields, optimizer=optimizer)
    _, clients = await train(world, honest)
    expected = clients[0].outcomes[0].gradient_norm
    config = config_of(**fields, optimizer=optimizer, aggregation=aggregation)
    _, clients = await train(world, config, spoil=of("client-1", Kind.BACKWARD, large))
    assert clients[0].outcomes[0].gradient_norm < 10 * expected
    _, clients = await train(world, honest, spoil=of("client-1", Kind.BACKWARD, large))
    assert clients[0].outcomes[0].gradient_norm > 100 * expected


async def test_the_papers_sum_grows_with_the_clients(world: World) -> None:
    optimizer = OptimizerPart(lr=1e-2, eps=1e-5, max_grad_norm=None)
    config = config_of(strategy="client-batch", clients=3, optimizer=optimizer, steps=1)
    _, clients = await train(world, config)
    _, summed = await train(world, config.model_copy(update={"weighting": "paper-sum"}))
    ratio = summed[0].outcomes[0].gradient_norm / clients[0].outcomes[0].gradient_norm
    assert 2.0 < ratio < 4.0


async def test_a_paused_job_stands_still_and_another_does_not(world: World) -> None:
    config = config_of(strategy="client-batch", clients=2, steps=30)
    reference, _ = await train(world, config)
    job, clients = await begin(world, config)
    await until(lambda: job.record.step >= 3)
    await job.pause()
    assert job.state == "paused"
    seen: list[tuple[int, int]] = []
    while len(seen) < 3 or len(set(seen[-3:])) > 1:
        seen.append((job.record.step, world.host.works))
        await asyncio.sleep(0.05)
    assert job.record.step < 30, "what was under way came to its end, and no more"
    assert world.extension.budget.held == 0
    other, _ = await train(world, config_of(strategy="sequential", clients=1, steps=2))
    assert other.state == "done"
    await job.resume()
    for client in clients:
        assert await client.ended() == "done"
    same(await adapters(job), await adapters(reference))


async def test_two_jobs_do_not_disturb_each_other(world: World) -> None:
    one = config_of(strategy="client-batch", clients=2, steps=8)
    other = config_of(strategy="server-hierarchical", clients=2, steps=8, average_every=4, lora=LoraPart(r=2), seed=9)
    alone = [await adapters((await train(world, config))[0]) for config in (one, other)]
    jobs = await asyncio.gather(train(world, one), train(world, other))
    together = [await adapters(job) for job, _ in jobs]
    same(alone[0], together[0])
    close_to(alone[1], together[1], 5e-6)


async def test_what_is_held_stays_below_the_bound(world: World) -> None:
    config = config_of(strategy="client-batch", clients=3, accumulate=3, max_micros=3, steps=3, max_length=10)
    reference, _ = await train(world, config)
    held: list[int] = []
    take = world.extension.budget.take

    def watch(nbytes: int) -> None:
        take(nbytes)
        held.append(world.extension.budget.held)

    world.extension.budget.take = watch  # type: ignore[method-assign]
    await train(world, config)
    most = max(held)
    for bound in (most // 3, most // 12):
        held.clear()
        world.host.memory_bytes = bound
        job, _ = await train(world, config)
        assert max(held) <= bound
        close_to(await adapters(job), await adapters(reference), 1e-6)
    assert world.extension.budget.held == 0
    _, clients = await begin(world, config)
    world.host.memory_bytes = 1000
    await until(lambda: any(client.errors for client in clients))
    assert all(isinstance(error, LimitExceeded) for client in clients for error in client.errors)


async def test_states_that_do_not_fit_are_refused(world: World) -> None:
    _, (client,) = await begin(world, config_of(strategy="client-batch", clients=1, steps=50))
    await until(lambda: len(client.outcomes) > 2)
    rows = encode_rows(Codec.FP32, np.ones((4, world.width), np.float32))

    def forward(**fields: Any) -> None:
        plain = {"generation": 1, "step": 45, "micro": 0, "of": 1, "targets": 1, "lengths": (4,)}
        client.send(Kind.FORWARD, Forward(**(plain | fields)), Codec.FP32, rows)

    expected: list[tuple[dict[str, Any], type[FlLlamaError]]] = [
        ({"lengths": (3,)}, BadStates),
        ({"lengths": (1, 1, 2)}, BadStates),
        ({"targets": 5}, BadRequest),
        ({"of": 2}, BadRequest),
        ({"step": 51}, BadRequest),
    ]
    for fields, error in expected:
        forward(**fields)
        assert type(client.errors[-1]) is error, fields
    for step in range(44, 41, -1):
        forward(step=step)
    forward(step=41)
    forward(step=40)
    assert type(client.errors[-1]) is WindowExceeded


@pytest.mark.parametrize("strategy", ["sequential", "client-batch", "server-hierarchical"])
async def test_adapters_of_another_rank_are_refused_and_nobody_waits_for_better_ones(
    world: World, strategy: str
) -> None:
    def other_rank(client: Client, message: Message) -> Message | None:
        if not message.count or step_of(message) != 2:
            return message
        count = message.count // 2
        rows = bytes(message.rows)[: count * world.width * 4]
        return Message(message.kind, message.seq, message.header, message.codec, count, rows)

    config = config_of(strategy=strategy, clients=2, average_every=2)
    job, clients = await train(world, config, spoil=of("client-1", Kind.STEP, other_rank))
    (error,) = clients[1].errors
    assert isinstance(error, BadStates)
    assert "rank" in error.message
    assert not clients[1].outcomes[1].included
    assert job.record.tally.member(1).left_out == 1
    assert clients[0].outcomes[-1].loss is not None or strategy == "sequential"
    weights = await adapters(job)
    for client in clients:
        same(client.weights, {name: weights[name] for name in client.weights})


def join_frame(job: str, key: str, **fields: Any) -> Frame:
    plain: dict[str, Any] = {"job": job, "key": key, "client": "x", "secret": "0" * 64, "blocks": (1, 3)}
    return Frame(Kind.JOIN, handle=1, seq=1, payload=Join(**(plain | fields)).to_bytes())


async def test_who_may_join_and_who_may_not(world: World) -> None:
    job, key = await world.create(config_of(clients=1, steps=1000))
    _, other_key = await world.create(config_of(clients=1))
    sent: list[Frame] = []

    def take(frames: Frame | Iterator[Frame]) -> None:
        sent.extend((frames,) if isinstance(frames, Frame) else frames)

    def join(ident: str, its_key: str, **fields: Any) -> Any:
        return world.extension.join(join_frame(ident, its_key, **fields), "somebody", take)

    with pytest.raises(NotOwner, match="not the key"):
        join(job.record.id, other_key)
    with pytest.raises(UnknownJob):
        join("job-0", key)
    with pytest.raises(PartitionNotAllowed):
        join(job.record.id, key, blocks=(1, 2))
    guest = join(job.record.id, key, tokenizer="1" * 64)
    with pytest.raises(BadRequest, match="being checked"):
        guest.receive(Frame(Kind.STEP))
    await until(lambda: bool(sent))
    assert isinstance(error_from_frame(sent[0]), ModelMismatch)
    guest.receive(Frame(Kind.STEP))  # Whoever was turned away is not heard any more.
    sent.clear()
    join(job.record.id, key, client="a", secret="1" * 64)
    await until(lambda: any(frame.kind is Kind.RESYNC for frame in sent))
    sent.clear()
    join(job.record.id, key, client="b", secret="1" * 64)
    join(job.record.id, key, client="a", secret="2" * 64)
    await until(lambda: len(sent) == 2)
    assert [type(error_from_frame(frame)) for frame in sent] == [JobEnded, NotOwner]
    await job.cancel()
    with pytest.raises(JobEnded):
        join(job.record.id, key, client="a", secret="1" * 64)


async def test_a_second_connection_of_a_client_takes_the_place_of_the_first(world: World) -> None:
    job, (client,) = await begin(world, config_of(strategy="client-batch", clients=1, steps=60))
    await until(lambda: job.record.step >= 3)
    first = client.guest
    client.tasks[0].cancel()
    client.inbox = asyncio.Queue()
    client.tasks = []
    client.again()
    assert await client.ended() == "done"
    assert first.gone
    assert client.starts[-1].generation == 2


async def test_cancelled_clients_are_told_and_the_adapters_stay(world: World) -> None:
    job, clients = await begin(world, config_of(strategy="client-batch", clients=2, steps=1000))
    await until(lambda: job.record.step >= 3)
    await job.pause()
    await job.cancel()
    for client in clients:
        assert await client.ended() == "cancelled"
    weights = await adapters(job)
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    with pytest.raises(JobEnded):
        await job.pause()


@pytest.mark.parametrize("accumulate", [1, 2])
async def test_samples_are_counted_not_believed(world: World, accumulate: int) -> None:
    def lie(client: Client, message: Message) -> Message | None:
        header = json.dumps(json.loads(message.header) | {"samples": 2**32 - 1}).encode()
        return Message(message.kind, message.seq, header, message.codec, message.count, message.rows)

    config = config_of(strategy="server-hierarchical", clients=2, average_every=2, accumulate=accumulate)
    reference, _ = await train(world, config)
    job, _ = await train(world, config, spoil=of("client-1", Kind.STEP, lie))
    assert [job.record.tally.member(index).samples for index in (0, 1)] == [8 * accumulate] * 2
    assert job.record.tally.samples == 16 * accumulate
    close_to(await adapters(job), await adapters(reference), 1e-6)


async def test_a_micro_batch_that_is_void_behind_an_early_commit_does_not_count(world: World) -> None:
    """The client commits right behind its gradients; one of them then turns out not to be finite."""
    backs: dict[str, int] = {}

    def early(client: Client, message: Message) -> Message | None:
        if message.kind is Kind.STEP:
            return None
        if message.kind is Kind.BACKWARD and client.name == "client-1":
            backs[client.name] = backs.get(client.name, 0) + 1
            if backs[client.name] <= 2:
                client.post(scaled(message, float("nan") if backs[client.name] == 2 else 1.0, world.width))
                if backs[client.name] == 2:
                    commit(client)
                return None
        return message

    def commit(client: Client) -> None:
        header = Commit(generation=1, step=1, samples=4, targets=100, loss=1.0)
        client.post(Message(Kind.STEP, 99, header.model_dump_json().encode()))

    config = config_of(strategy="client-batch", clients=2, steps=1, accumulate=2, shared="B")
    job, clients = await begin(world, config, spoil=early)
    await until(lambda: backs.get("client-1") == 2 and job.activation_bytes >= 0)
    clients[0].spoil = lambda client, message: message
    await until(lambda: bool(clients[0].losses))
    commit(clients[0])
    for client in clients:
        assert await client.ended() == "done"
    assert [job.record.tally.member(index).samples for index in (0, 1)] == [4, 2]
    assert NonFiniteStates in {type(error) for error in clients[1].errors}
    assert clients[1].outcomes[0].included


async def test_a_generation_that_never_was_is_refused(world: World) -> None:
    job, key = await world.create(config_of(strategy="client-batch", clients=2))
    one = world.client("a", job, key)
    one.generation = 2**32 - 1
    one.start()
    await until(lambda: bool(one.errors))
    assert isinstance(one.errors[0], BadRequest)
    # One that may have been, before job.json's newest content was lost, is taken, and gone beyond.
    one.generation = 7
    one.again()
    other = world.client("b", job, key).start()
    for client in (one, other):
        assert await client.ended() == "done"
    assert job.record.generation == 8


class Broken:
    """Blocks that fail."""

    def block_bytes(self, groups: Any, *, keep: bool) -> int:
        return 0

    def forward(self, rows: Any, groups: Any, *, keep: bool, span: Any = None) -> Any:
        raise RuntimeError("the device is gone")
        yield


async def test_a_failure_ends_one_job_alone(make_world: MakeWorld) -> None:
    def make(segment: Any, lora: Any) -> Any:
        return Broken() if lora.r == 5 else Trunk(segment, lora)

    world = await make_world(make_trunk=make)
    bad, bad_clients = await begin(world, config_of(strategy="client-batch", clients=1, lora=LoraPart(r=5)))
    good, _ = await train(world, config_of(strategy="client-batch", clients=1))
    assert "the server failed" in await bad_clients[0].ended()
    assert (bad.state, good.state) == ("failed", "done")
    assert world.extension.budget.held == 0


async def test_steps_that_are_far_too_large_leave_no_infinity_behind(world: World) -> None:
    optimizer = OptimizerPart(lr=1e30, max_grad_norm=None, schedule="constant")
    job, clients = await train(world, config_of(strategy="client-batch", clients=1, optimizer=optimizer))
    assert [outcome.skipped is None for outcome in clients[0].outcomes] == [True, False, False, False]
    assert job.record.tally.skipped == 3
    assert all(bool(tensor.isfinite().all()) for tensor in (await adapters(job)).values())


async def test_what_cannot_be_a_job_is_refused(world: World) -> None:
    for fields, error in (
        ({"partition": "0,1"}, PartitionNotAllowed),
        ({"partition": "2,2"}, UsageError),
        ({"strategy": "os:system"}, UsageError),
        ({"steps": 0}, UsageError),
        ({"stepps": 3}, UsageError),
    ):
        raw = config_of().model_dump(mode="json") | fields
        with pytest.raises(error):
            await world.extension.create(raw, "somebody")
    assert world.extension.jobs == []


async def test_every_other_thread_is_in_inference_mode_and_nothing_notices(world: World) -> None:
    # The host's thread is that of inference; leaves made there must be leaves all the same.
    assert not torch.is_inference_mode_enabled()
    job, _ = await train(world, config_of(strategy="client-batch", clients=1, steps=1))
    assert not any(tensor.is_inference() for tensor in (await adapters(job)).values())
