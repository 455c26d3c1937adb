"""A client that lacks what its server takes for granted: it says so, and no state is taken for that of another step."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint

from split_llama.errors import CacheError, CheckpointError, NonFiniteStates
from split_llama.wire.frame import Kind
from split_llama.wire.training import Commit, Message, Start
from tests.training.client.fake_job import FakeJob, Seat
from tests.training.client.people import (
    PATIENCE,
    STRATEGIES,
    Someone,
    all_weights,
    equal,
    job,
    running,
    to_the_end,
    true_after,
    undisturbed,
)


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint()


def full_disk(*_: Any) -> None:
    raise CacheError("the checkpoint cannot be written: No space left on device")


def asks_bob_for_step_2(fake: FakeJob) -> None:
    """When it comes to step 6, the fake server asks one client for a state that is due to be on its disk."""

    def hook(seat: Seat, message: Message) -> Any:
        if message.kind is Kind.STEP and seat.index == fake.indices["bob"] and fake.step == 5:
            fake.hook = lambda *_: None
            return true_after(ask(seat))
        return None

    async def ask(seat: Seat) -> None:
        fake.generation += 1
        await seat.send(Kind.RESYNC, Start(generation=fake.generation, step=2, present=(0, 1)), fake.width)

    fake.hook = hook


async def test_a_client_that_lacks_the_state_it_is_asked_for_joins_again_with_the_truth(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(model, tmp_path / "calm", steps=7)
    fake = FakeJob(model, job(steps=7))
    asks_bob_for_step_2(fake)
    ann, bob = (Someone(fake, name, tmp_path / "full") for name in ("ann", "bob"))
    monkeypatch.setattr(bob.state._checkpoints, "save", full_disk)
    assert await to_the_end(ann, bob) == ["the job is done"] * 2
    assert [join.client for join in fake.joins].count("bob") == 2
    assert fake.joins[-1].have == (0, 3, 4, 5, 6)
    assert any("joining again with what there is" in note for note in bob.watcher.notes)
    assert not any("the server was lost" in note for note in bob.watcher.notes)
    assert equal(expected, all_weights(fake, [ann, bob]))


async def test_a_state_that_is_asked_for_again_ends_the_client(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeJob(model, job(steps=7))
    asks_bob_for_step_2(fake)
    ann, bob = (Someone(fake, name, tmp_path) for name in ("ann", "bob"))
    monkeypatch.setattr(bob.state._checkpoints, "save", full_disk)
    start = fake._start

    async def stubborn() -> None:
        if not fake.step:
            await start()
            return
        fake.generation += 1
        for seat in fake.seats.values():
            await seat.send(Kind.RESYNC, Start(generation=fake.generation, step=2, present=(0, 1)), fake.width)

    monkeypatch.setattr(fake, "_start", stubborn)
    async with asyncio.timeout(PATIENCE), running(ann, bob) as (_, second):
        with pytest.raises(CheckpointError, match=r"step 2.*asks for it again.*same command"):
            await second
    assert [join.client for join in fake.joins].count("bob") == 2


async def test_a_client_joins_again_when_it_has_stepped_the_share_whose_answers_it_has(
    model: Path, tmp_path: Path
) -> None:
    """The link is cut with the last answer just heard, while A still goes back: the JOIN must wait for that."""
    expected = await undisturbed(model, tmp_path / "calm", steps=5, checkpoint_every=50)
    going_back, cut = threading.Event(), threading.Event()
    fake = FakeJob(model, job(steps=5, checkpoint_every=50))
    ann, bob = (Someone(fake, name, tmp_path / "cut") for name in ("ann", "bob"))
    go_back = bob.maths.backward
    backs: list[int] = []

    def slow(sent: Any, answer: Any) -> Any:
        backs.append(1)
        if len(backs) == 3:
            going_back.set()
            cut.wait(PATIENCE)
            time.sleep(0.3)
        return go_back(sent, answer)

    bob.maths.backward = slow  # type: ignore[method-assign]

    async def cutting() -> None:
        await asyncio.to_thread(going_back.wait, PATIENCE)
        await fake.cut_off(fake.indices["bob"])
        cut.set()

    cutter = asyncio.create_task(cutting())
    await to_the_end(ann, bob)
    await cutter
    assert [join.client for join in fake.joins].count("bob") == 2
    assert 3 in fake.joins[-1].have
    assert equal(expected, all_weights(fake, [ann, bob]))


@pytest.mark.parametrize("clients", [["ann", "bob"], ["bob"]], ids=len)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
async def test_a_client_with_nothing_finite_stays_with_its_job(
    model: Path, tmp_path: Path, strategy: dict[str, Any], clients: list[str]
) -> None:
    """Its commits go no further ahead than the server's word, so that each state is that of its step."""
    fake = FakeJob(model, job(steps=8, accumulate=2, clients=len(clients), **strategy))
    people = [Someone(fake, name, tmp_path) for name in clients]
    bob = people[-1]

    def bad(*_: Any) -> None:
        raise NonFiniteStates("inf in the output of A")

    bob.maths.forward = bad  # type: ignore[method-assign]
    ahead: list[int] = []
    shares: list[int] = []

    def hook(seat: Seat, message: Message) -> None:
        if message.kind is Kind.STEP and seat.index == fake.indices["bob"]:
            ahead.append(Commit.from_bytes(message.header).step - fake.step)
            shares.append(Commit.from_bytes(message.header).step)

    fake.hook = hook
    cursors: dict[int, int] = {}
    confirm = bob.state.confirm

    def confirmed(step: int, weights: Any) -> None:
        confirm(step, weights)
        cursors[step] = bob.state._live[step].cursor

    bob.state.confirm = confirmed  # type: ignore[method-assign]
    await to_the_end(*people)
    assert set(ahead) == {1}
    assert cursors == {step: 2 * sum(share <= step for share in shares) for step in range(1, 9)}
