"""Places: order, bounds, and waiters who give up."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from edge_client.gateway.places import Places
from split_llama.errors import LimitExceeded


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Taker:
    """Takes places in a task of its own until it is told to leave."""

    def __init__(self, places: Places, count: int = 1) -> None:
        self.is_in = False
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(places, count))

    async def _run(self, places: Places, count: int) -> None:
        async with places.take(count):
            self.is_in = True
            await self.leave.wait()


async def test_places_go_in_the_order_of_asking() -> None:
    places = Places(2, 10)
    takers = [Taker(places) for _ in range(4)]
    await settle()
    assert [taker.is_in for taker in takers] == [True, True, False, False]
    assert (places.running, places.waiting) == (2, 2)
    takers[1].leave.set()
    await settle()
    assert [taker.is_in for taker in takers] == [True, True, True, False]
    for taker in takers:
        taker.leave.set()
    await asyncio.gather(*(taker.task for taker in takers))
    assert (places.running, places.waiting) == (0, 0)


async def test_many_places_at_once_are_not_overtaken() -> None:
    places = Places(4, 10)
    small = [Taker(places) for _ in range(2)]
    await settle()
    large, late = Taker(places, 4), Taker(places)
    await settle()
    assert not large.is_in
    assert not late.is_in, "a newcomer would keep the large one waiting for ever"
    for taker in small:
        taker.leave.set()
    await settle()
    assert (large.is_in, late.is_in) == (True, False)
    large.leave.set()
    await settle()
    assert late.is_in
    late.leave.set()
    await late.task


async def test_a_full_line_is_told_at_once() -> None:
    places = Places(1, 1)
    places.check()
    first = Taker(places)
    await settle()
    places.check()
    second = Taker(places)
    await settle()
    with pytest.raises(LimitExceeded, match="1 answers are being made and 1 requests wait") as caught:
        places.check()
    assert caught.value.retry_after_ms > 0
    for taker in (first, second):
        taker.leave.set()
        await taker.task
    places.check()


async def test_no_line_at_all_still_gives_free_places() -> None:
    places = Places(1, 0)
    places.check()
    async with places.take():
        with pytest.raises(LimitExceeded):
            places.check()
    places.check()


@pytest.mark.parametrize("is_granted_first", [True, False])
async def test_who_gives_up_takes_no_place_along(is_granted_first: bool) -> None:
    """Also at the very moment when the place comes, in either order."""
    places = Places(1, 5)
    holder = Taker(places)
    await settle()
    waiter, behind = Taker(places), Taker(places)
    await settle()
    if is_granted_first:
        holder.leave.set()
        # Until the holder's task has run its last step, and the waiter's has not gone on.
        while not holder.task.done():
            await asyncio.sleep(0)
            if places.waiting == 1:
                break
        waiter.task.cancel()
    else:
        waiter.task.cancel()
        holder.leave.set()
    with contextlib.suppress(asyncio.CancelledError):
        await waiter.task
    await settle()
    assert behind.is_in
    behind.leave.set()
    await behind.task
    assert (places.running, places.waiting) == (0, 0)
