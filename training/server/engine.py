"""A job's computing: which passes fit into memory, and everything that touches weights, one work after the other.

Called from the event loop; the work itself is generators for the thread that computes, and files are read and written
in the background.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from split_llama.errors import NonFiniteStates
from split_llama.extension import Host
from split_llama.layers import Segment
from split_llama.lora import LoraConfig
from split_llama.wire.codec import Floats, decode_rows
from split_llama.wire.training import flatten, unflatten
from training.checkpoints import Checkpoints
from training.job_config import JobConfig
from training.server.adapters import AdapterPlan
from training.server.budget import Account, Budget
from training.server.passes import Blocks, Pass, Passes, Results
from training.server.records import Cohort, Micro, Phase, Rows, Share
from training.server.sets import Offer, Stepped, WeightSets
from training.server.size import least_bytes

T = TypeVar("T")

# What waits so long for a client of its own job is dropped where there is no room for others of that job.
STALE_SECONDS = 5.0

MakeTrunk = Callable[[Segment, LoraConfig | None], Blocks]


@dataclass(frozen=True, slots=True, eq=False)
class Met:
    """What a meeting did: each client's own step, and who was left out of the average, and why."""

    steps: Mapping[int, Stepped]
    skipped: Mapping[int, str]


@dataclass(slots=True, eq=False)
class _Loaded:
    """What there is once the blocks are loaded."""

    sets: WeightSets
    passes: Passes


def most_that_fit(count: int, fits: Callable[[int], bool]) -> int:
    """Give the largest number up to `count` that fits, 0 if none does; where one does not, no larger one may."""
    if fits(count):
        return count
    return bisect_left(range(1, count), True, key=lambda fewer: not fits(fewer))


class Engine:
    """The computing of one job. `names` gives the clients' names by their numbers, and may grow.

    `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        host: Host,
        config: JobConfig,
        plan: AdapterPlan,
        budget: Budget,
        make_trunk: MakeTrunk,
        names: Mapping[int, str],
        *,
        own_sets: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._config = config
        self._plan = plan
        self._budget = budget
        self._account = Account(budget, STALE_SECONDS)
        self._clock = clock
        self._reminder: asyncio.TimerHandle | None = None
        self._make_trunk = make_trunk
        self._names = names
        self._own_sets = own_sets
        self._loaded: _Loaded | None = None
        self._keep = True

    # State

    @property
    def has_state(self) -> bool:
        """Say whether there are weights."""
        return self._loaded is not None

    async def restore(self, checkpoints: Checkpoints, step: int, clients: Iterable[int]) -> None:
        """Go to the state after `step`; 0 is where all begins. Raises `CheckpointError`."""
        loaded = self._loaded or await self._load()
        seats = sorted(clients)
        stored = await self._host.in_background(lambda: checkpoints.load(step).tensors if step else {})
        await self._at_once(lambda: loaded.sets.load(stored, seats) if step else loaded.sets.reset(seats))
        await self._host.in_background(lambda: checkpoints.drop_after(step))
        self._loaded = loaded

    async def go_on(self, clients: Iterable[int]) -> None:
        """Forget the step under way; with own sets keep those of `clients`, and make one for who has none."""
        sets, seats = self._ready.sets, sorted(clients)

        def work() -> None:
            sets.drop_gradients()
            sets.seat(seats)

        await self._at_once(work)

    def release(self) -> None:
        """Let go of all weights: the job is over."""
        self._loaded = None

    async def snapshot(self) -> dict[str, torch.Tensor]:
        """Give copies, on the CPU, of what a checkpoint holds."""
        sets = self._ready.sets
        return await self._at_once(lambda: {name: tensor.cpu() for name, tensor in sets.tensors().items()})

    async def adapters(self) -> dict[str, torch.Tensor]:
        """Give copies, on the CPU, of the adapters that all share."""
        return await self._at_once(self._ready.sets.adapters)

    def stored(self, checkpoints: Checkpoints) -> tuple[dict[str, torch.Tensor], int]:
        """Give the shared adapters of the newest checkpoint, and its step; without one, the first values. Blocking."""
        step = max(checkpoints.steps(), default=0)
        sets = WeightSets(self._plan, self._config, torch.device("cpu"), own=self._own_sets)
        if step:
            sets.load(checkpoints.load(step).tensors, ())
        else:
            sets.reset(())
        return sets.adapters(), step

    async def end_rows(self) -> Floats:
        """Give the weights of A and C as rows for the wire."""
        sets, width = self._ready.sets, self._plan.model.hidden_size

        def work() -> Floats:
            return flatten({name: ends.numpy() for name, ends in sets.adapters(self._plan.ends).items()}, width)

        return await self._at_once(work)

    @property
    def _ready(self) -> _Loaded:
        assert self._loaded is not None, "nothing is computed before the state is restored"
        return self._loaded

    async def _load(self) -> _Loaded:
        host, config = self._host, self._config
        dtype = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
        segment = await host.in_background(lambda: host.dense_segment(dtype))
        trunk = self._make_trunk(segment, self._plan.lora if self._plan.trunk else None)
        sets = WeightSets(self._plan, config, host.device, own=self._own_sets)
        width, span = self._plan.model.hidden_size, self._plan.blocks
        return _Loaded(sets, Passes(trunk, span, sets, config, self._names, width=width, device=host.device))

    async def _at_once(self, work: Callable[[], T]) -> T:
        def steps() -> Generator[None, None, T]:
            yield
            return work()

        return await self._host.compute(steps())

    # Memory

    def least_bytes(self, lengths: tuple[int, ...]) -> int:
        """Estimate what one micro-batch of these sequences needs at least, from its forward to its backward."""
        return least_bytes(self._config, self._plan, sum(lengths))

    @property
    def held_bytes(self) -> int:
        """Bytes that the job's tapes hold, those of passes that are running included."""
        return self._account.held

    def room(self, micros: Sequence[Micro]) -> int:
        """Say how many of these may go forward together now; as many as can without their graphs if not with them.

        Where there is no room for any, tapes that wait for other jobs' clients, or too long, make room.
        """
        count = self._that_fit(micros)
        if not count and self._account.make_room(self._need(micros[:1], keep=False), self._clock()):
            count = self._that_fit(micros)
        if count:
            return count
        # With nothing else held, one has to go: it was seen to fit by itself when it came.
        self._keep = False
        if self._budget.held:
            self._ask_again()
        return int(self._budget.held == 0)

    def _that_fit(self, micros: Sequence[Micro]) -> int:
        count = most_that_fit(len(micros), lambda count: self._fits_together(micros[:count]))
        return count if count and self._fits_together(micros[:count]) else 0

    def _ask_again(self) -> None:
        """Have all jobs ask again once something of this one has waited too long."""
        if self._reminder is not None:
            self._reminder.cancel()
        seconds = self._account.asks_again_in(self._clock())
        if seconds is not None:
            self._reminder = asyncio.get_running_loop().call_later(seconds, self._budget.tell)

    def _fits_together(self, micros: Sequence[Micro]) -> bool:
        """Say whether these fit, and note whether with their graphs."""
        for keep in (False,) if self._config.recompute else (True, False):
            if self._budget.fits(self._need(micros, keep=keep)):
                self._keep = keep
                return True
        return False

    def _need(self, micros: Sequence[Micro], *, keep: bool) -> int:
        """What clients sent is not counted: it waits with or without a pass, and `check_size` bounds it."""
        return self._ready.passes.held_bytes(micros, keep=keep)

    # Passes

    async def forward(self, cohort: Cohort) -> Results:
        """Take a cohort forward; it holds its tape then."""
        members = cohort.members
        inputs = [micro.rows for micro in members if micro.rows is not None]
        self._hold(cohort, None, self._need(members, keep=self._keep))
        try:
            work = self._ready.passes.forward(members, inputs, keep=self._keep)
            the_pass, results = await self._host.compute(work)
        finally:
            cohort.drop_tape()
        if the_pass is not None:
            self._hold(cohort, the_pass, the_pass.nbytes)
            self._account.waits(cohort, self._clock())
        return results

    async def backward(self, cohort: Cohort) -> Results:
        """Take back what returned of a cohort, add it to the clients' shares, and let the tape go."""
        members = [micro for micro in cohort.members if micro.phase is Phase.RETURNED]
        inputs = [micro.rows for micro in members if micro.rows is not None]
        gradients = [micro.gradient for micro in members if micro.gradient is not None]
        self._account.is_used(cohort)
        the_pass, keep = cohort.tape, False
        if members and the_pass is None:
            keep = not self._config.recompute and self._budget.fits(self._need(members, keep=True))
            self._hold(cohort, None, self._need(members, keep=keep))
        if not members:
            cohort.drop_tape()
            return Results()
        try:
            work = self._ready.passes.backward(the_pass, members, inputs, gradients, keep=keep)
            return await self._host.compute(work)
        finally:
            cohort.drop_tape()

    def _hold(self, cohort: Cohort, the_pass: Pass | None, nbytes: int) -> None:
        self._account.take(nbytes)
        cohort.tape, cohort.nbytes, cohort.release = the_pass, nbytes, self._account.release

    # Steps

    async def step(self, step: int, shares: Sequence[Share], left: Sequence[int]) -> Stepped:
        """Make an optimizer step of the set that `shares` belong to; what those left out added is dropped."""
        sets = self._ready.sets

        def work() -> Stepped:
            sets.drop_gradients(left)
            return sets.step(step, self._offers(shares))

        return await self._at_once(work)

    async def meet(self, step: int, shares: Sequence[Share]) -> Met:
        """Make a step in each share's own set, then average them all."""
        sets = self._ready.sets

        def work() -> Met:
            offers = self._offers(shares)
            steps = {offer.client: sets.step(step, [offer]) for offer in offers}
            skipped = sets.meet(offers)
            sets.drop_gradients()
            return Met(steps, skipped)

        return await self._at_once(work)

    def _offers(self, shares: Sequence[Share]) -> list[Offer]:
        return [
            Offer(share.client, share.targets, share.samples, self._ends(share.tensors))
            for share in shares
            if share.commit is not None
        ]

    def _ends(self, rows: Rows | None) -> dict[str, torch.Tensor] | None:
        """Decode A's and C's tensors; none where they are not finite."""
        if rows is None:
            return {}
        values = np.empty((rows.count, self._plan.model.hidden_size), np.float32)
        try:
            decode_rows(rows.codec, rows.data, values)
        except NonFiniteStates:
            return None
        return {name: torch.from_numpy(value) for name, value in unflatten(values, self._plan.ends).items()}
