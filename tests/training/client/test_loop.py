"""A client's loop against a scripted server: the same weights whatever happens in between, and what is said of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint

from split_llama.errors import CacheError, JobEnded, NonFiniteStates, NotOwner, ServerUnreachable
from split_llama.wire.control import error_frame
from split_llama.wire.frame import Kind
from split_llama.wire.training import Backward, Forward, Message
from tests.training.client.fake_job import FakeJob, Seat
from tests.training.client.people import (
    PATIENCE,
    STRATEGIES,
    Someone,
    all_weights,
    equal,
    job,
    running,
    same,
    to_the_end,
    true_after,
    undisturbed,
)


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
async def test_all_weights_move_and_every_step_is_told(model: Path, tmp_path: Path, strategy: dict[str, Any]) -> None:
    fake = FakeJob(model, job(accumulate=2, **strategy))
    people = [Someone(fake, name, tmp_path) for name in ("ann", "bob")]
    before = all_weights(fake, people)
    await to_the_end(*people)
    after = all_weights(fake, people)
    for old, new in zip(before, after, strict=True):
        assert all(not torch.equal(old[name], new[name]) for name in old if "lora_B" in name)
    for someone in people:
        assert [record.step for record in someone.watcher.records] == [1, 2, 3, 4]
        assert someone.watcher.records[-1].job_loss == pytest.approx(fake.losses[4])
        assert someone.watcher.records[-1].bytes_up > 0
        assert someone.state.step == 4
    if strategy.get("shared") == "A,B,C":
        assert same(after[1], after[2])


async def test_micro_batches_fly_together_and_give_what_one_after_the_other_gives(model: Path, tmp_path: Path) -> None:
    weights = []
    for micros in (1, 4):
        fake = FakeJob(model, job(accumulate=6), max_micros=micros)
        people = [Someone(fake, name, tmp_path / str(micros)) for name in ("ann", "bob")]
        await to_the_end(*people)
        assert fake.most_in_flight == micros
        weights.append(all_weights(fake, people))
    assert equal(*weights)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("kind", [Kind.FORWARD, Kind.BACKWARD, Kind.STEP], ids=lambda kind: kind.name)
@pytest.mark.parametrize("fault", ["cut", "crash"])
async def test_a_cut_connection_or_a_killed_server_changes_no_weight(
    model: Path, tmp_path: Path, strategy: dict[str, Any], kind: Kind, fault: str
) -> None:
    expected = await undisturbed(model, tmp_path / "calm", accumulate=2, **strategy)
    left = [1 if kind is Kind.STEP else 2]  # The second such message of step 3 brings the fault.

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is not kind or json.loads(message.header)["step"] != 3 or not left[0]:
            return None
        left[0] -= 1
        if left[0]:
            return None
        return true_after(fake.crash() if fault == "crash" else fake.cut_off(seat.index))

    fake = FakeJob(model, job(accumulate=2, **strategy), hook=hook)
    people = [Someone(fake, name, tmp_path / "faulty") for name in ("ann", "bob")]
    await to_the_end(*people)
    assert left == [0]
    assert fake.generation == 2
    assert equal(expected, all_weights(fake, people))


async def test_an_outcome_that_was_not_heard_goes_back_no_further_than_it(model: Path, tmp_path: Path) -> None:
    """The server closed step 3 while one client's link was down, which has done its share and can restore it."""
    expected = await undisturbed(model, tmp_path / "calm", steps=5, checkpoint_every=50)
    cut: list[int] = []

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.STEP and fake.step == 2 and len(fake.committed) == 1 and not cut:
            cut.append(seat.index)
            return self_closing(seat, message)
        return None

    async def self_closing(seat: Seat, message: Message) -> bool:
        fake.hook = lambda *_: None
        await seat.channel.close(1006, "cut just before the outcome")
        await fake._commit(seat, message)
        return True

    fake = FakeJob(model, job(steps=5, checkpoint_every=50), hook=hook)
    people = [Someone(fake, name, tmp_path / "cut") for name in ("ann", "bob")]
    await to_the_end(*people)
    assert cut
    assert 3 in fake.joins[-1].have
    assert equal(expected, all_weights(fake, people))


@pytest.mark.parametrize("shared", ["B", "A,B,C"])
async def test_a_killed_client_comes_back_from_its_checkpoint(model: Path, tmp_path: Path, shared: str) -> None:
    expected = await undisturbed(model, tmp_path / "calm", steps=6, shared=shared)
    fake = FakeJob(model, job(steps=6, shared=shared))
    ann, bob = (Someone(fake, name, tmp_path / "killed") for name in ("ann", "bob"))
    reached = asyncio.Event()

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.BACKWARD and seat.index == fake.indices["bob"] and fake.step == 3:
            reached.set()
            return True  # It dies with this on the wire.
        return None

    fake.hook = hook
    async with asyncio.timeout(PATIENCE), running(ann) as tasks:
        async with running(bob):
            await reached.wait()
        fake.hook = lambda *_: None
        again = Someone(fake, "bob", tmp_path / "killed")
        assert again.state.have() == (0, 2)
        await to_the_end(again)
        await tasks[0]
    assert equal(expected, all_weights(fake, [ann, again]))


async def test_a_client_that_was_told_to_go_comes_back_where_it_stood(model: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model, tmp_path / "calm", checkpoint_every=100)
    fake = FakeJob(model, job(checkpoint_every=100))
    ann, bob = (Someone(fake, name, tmp_path / "told") for name in ("ann", "bob"))
    reached = asyncio.Event()

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.BACKWARD and seat.index == fake.indices["bob"] and fake.step == 2:
            reached.set()
            return True
        return None

    fake.hook = hook
    async with asyncio.timeout(PATIENCE), running(ann) as tasks:
        async with running(bob):
            await reached.wait()
        bob.state.save_for_return()
        fake.hook = lambda *_: None
        again = Someone(fake, "bob", tmp_path / "told")
        assert again.state.have() == (0, 2)
        await to_the_end(again)
        await tasks[0]
    assert fake.generation == 2
    assert equal(expected, all_weights(fake, [ann, again]))


async def test_a_loss_that_is_not_finite_costs_its_micro_batch_and_nothing_else(model: Path, tmp_path: Path) -> None:
    fake = FakeJob(model, job(accumulate=2))
    ann, bob = (Someone(fake, name, tmp_path) for name in ("ann", "bob"))
    real = bob.maths.ends.head.lm_head.weight
    hurt: list[int] = []
    judge = bob.maths.loss

    def loss(sent: Any, answer: Any, place: Any) -> Any:
        if (place.step, place.micro) != (2, 1):
            return judge(sent, answer, place)
        hurt.append(place.step)
        kept = real.detach().clone()
        real.data.fill_(float("nan"))
        try:
            return judge(sent, answer, place)
        finally:
            real.data.copy_(kept)

    bob.maths.loss = loss  # type: ignore[method-assign]
    empty: list[Backward] = []

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.BACKWARD and not message.count:
            empty.append(Backward.from_bytes(message.header))

    fake.hook = hook
    await to_the_end(ann, bob)
    assert hurt == [2]
    assert [(back.step, back.micro) for back in empty] == [(2, 1)]
    assert [commit.step for commit in fake.commits if commit.loss is None] == [2]
    assert [record.void for record in bob.watcher.records] == [0, 1, 1, 1]
    assert [record.void for record in ann.watcher.records] == [0, 0, 0, 0]
    assert any("step 2" in note and "no finite number" in note for note in bob.watcher.notes)
    assert all(bool(torch.isfinite(weight).all()) for weight in bob.weights().values())


async def test_a_micro_batch_the_server_refuses_is_left_out_of_the_commit(model: Path, tmp_path: Path) -> None:
    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.FORWARD:
            header = Forward.from_bytes(message.header)
            if (seat.index, header.step, header.micro) == (0, 1, 0):
                refusal = error_frame(seat.handle, message.seq, NonFiniteStates("NaN in row 3"))
                return true_after(seat.channel.send(refusal.encode()))
        return None

    fake = FakeJob(model, job(accumulate=2), hook=hook)
    people = [Someone(fake, name, tmp_path) for name in ("ann", "bob")]
    await to_the_end(*people)
    first = [commit for commit in fake.commits if commit.step == 1]
    assert sorted(commit.samples for commit in first) == [2, 4]
    assert people[0].watcher.records[-1].void == 1
    assert "NaN in row 3" in people[0].watcher.notes[0]


async def test_a_step_that_was_closed_without_a_client_is_abandoned(model: Path, tmp_path: Path) -> None:
    held: list[Message] = []

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.FORWARD and seat.index == 1 and Forward.from_bytes(message.header).step == 2:
            held.append(message)
            return true_after(fake.close_step(frozenset({1}))) if fake.step == 1 and fake.committed else True
        if message.kind is Kind.STEP and seat.index == 0 and fake.step == 1 and held:
            return true_after(_commit_alone(seat, message))
        return None

    async def _commit_alone(seat: Seat, message: Message) -> None:
        await fake._commit(seat, message)
        await fake.close_step(frozenset({1}))

    fake = FakeJob(model, job(), hook=hook)
    people = [Someone(fake, name, tmp_path) for name in ("ann", "bob")]
    await to_the_end(*people)
    assert held
    bob = people[1]
    assert [record.contributed for record in bob.watcher.records] == [True, False, True, True]
    # What it had begun is not lost: it goes into the next step.
    assert bob.state.cursor == 3


async def test_a_full_disk_is_said_and_training_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeJob(model, job())
    people = [Someone(fake, name, tmp_path) for name in ("ann", "bob")]

    def full(*_: Any) -> None:
        raise CacheError("the checkpoint cannot be written: No space left on device. Older checkpoints are untouched")

    monkeypatch.setattr(people[0].state._checkpoints, "save", full)
    await to_the_end(*people)
    assert [note for note in people[0].watcher.notes if "No space left" in note and "goes on" in note]
    assert not [note for note in people[1].watcher.notes if "No space" in note]
    assert people[0].state.step == 4


async def test_a_refused_join_is_told_at_once(model: Path, tmp_path: Path) -> None:
    def hook(seat: Seat, message: Message) -> Any:
        raise NotOwner("the key is another job's")

    fake = FakeJob(model, job(), hook=hook)
    with pytest.raises(NotOwner, match="another job's"):
        await to_the_end(Someone(fake, "ann", tmp_path))
    assert len(fake.joins) == 1


async def test_a_server_that_is_not_ready_is_asked_again(model: Path, tmp_path: Path) -> None:
    refused: list[int] = []

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.JOIN and len(refused) < 2:
            refused.append(1)
            raise ServerUnreachable("still loading", retry_after_ms=10)

    fake = FakeJob(model, job(clients=1), hook=hook)
    ann = Someone(fake, "ann", tmp_path)
    assert await to_the_end(ann) == ["the job is done"]
    assert len(fake.joins) == 3


async def test_a_server_that_stays_away_is_given_up(model: Path, tmp_path: Path) -> None:
    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.JOIN:
            raise ServerUnreachable("still loading")

    fake = FakeJob(model, job(clients=1), hook=hook)
    with pytest.raises(ServerUnreachable):
        await to_the_end(Someone(fake, "ann", tmp_path, reconnect_seconds=0.3))


async def test_a_job_that_was_cancelled_ends_its_clients(model: Path, tmp_path: Path) -> None:
    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.FORWARD and fake.step == 1:
            refusal = error_frame(seat.handle, message.seq, JobEnded("the job was cancelled"))
            return true_after(seat.channel.send(refusal.encode()))
        return None

    fake = FakeJob(model, job(clients=1), hook=hook)
    with pytest.raises(JobEnded, match="cancelled"):
        await to_the_end(Someone(fake, "ann", tmp_path))
