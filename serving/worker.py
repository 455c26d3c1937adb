"""The engine loop: tasks that pick, plan and deliver, and threads that compute.

The loop owns sessions and pages; the threads get immutable plans. A pass is

    loop: pick -> engine thread: decode, check for NaN -> loop: pages, plan -> engine thread: start
    -> its own thread: wait for the outputs, encode -> loop: deliver

so that a bad step fails alone before any page changes, and nothing but the threads ever computes. At most
`Passes.depth` passes are unfinished: with more than one, the next pass is made ready while the last one still runs.
They start in the order in which they were planned, and a session is in one of them at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from serving.background import Background
from serving.figures import Figures
from serving.memory import give_back, is_out_of_memory
from serving.metrics import Metrics
from serving.pace import Pace
from serving.passes import Outcome, Passes
from serving.quanta import Quanta
from serving.registry import Entry, Registry
from serving.room import Room
from serving.scheduler import Candidate, Pick, Scheduler
from serving.session import Phase, Session
from serving.steps import Step
from serving.threads import WorkThread
from split_llama.engine.engine import Engine
from split_llama.engine.pages import CacheEdit
from split_llama.engine.plan import BatchPlan, SequenceRun
from split_llama.errors import FlLlamaError, OutOfPages, ServerFault
from split_llama.wire.control import error_frame

FAULTS_UNTIL_UNHEALTHY = 3
PAGES_RETRY_SECONDS = 0.1

log = logging.getLogger("fl_llama.worker")


@dataclass(slots=True)
class _Share:
    """One session's part of a pass: its steps, as indices into the batch, and their run of rows."""

    entry: Entry
    indices: list[int]
    run: SequenceRun


@dataclass(slots=True)
class _Pass:
    """A planned pass: who was picked with which steps, the cache edits that go first, and which steps ride (`kept`)."""

    picks: Sequence[Pick[Entry]]
    steps: Sequence[Step]
    edits: Sequence[CacheEdit]
    shares: Sequence[_Share]
    kept: Sequence[int]


class Worker:
    """Runs passes as long as there is work. `kick` after queueing a step."""

    def __init__(
        self,
        engine: Engine,
        passes: Passes,
        registry: Registry,
        scheduler: Scheduler,
        metrics: Metrics,
        clock: Callable[[], float],
        evict_after: float,
        quanta: Quanta,
    ) -> None:
        self._engine = engine
        self._passes = passes
        self._scheduler = scheduler
        self._metrics = metrics
        self._figures = Figures(metrics)
        self._clock = clock
        self._room = Room(engine.pool, registry, metrics, clock, evict_after)
        self._engine_thread = WorkThread("engine")
        self._finish_thread = WorkThread("finish")
        # Ordered, and perhaps with some that have nothing queued any more: `_candidates` drops those.
        self._queued: dict[Entry, None] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.background = Background(self._engine_thread, self._idle, quanta, clock, _settler(engine.segment.device))
        self._unfinished = 0
        self._pace = Pace()
        self._ending: set[asyncio.Task[None]] = set()
        self._faults_in_a_row = 0

    @property
    def is_healthy(self) -> bool:
        """Say whether passes succeed; when one after the other fails, the device or the process needs a restart."""
        return self._faults_in_a_row < FAULTS_UNTIL_UNHEALTHY

    def kick(self, entry: Entry) -> None:
        """Say that a session may have work."""
        self._queued[entry] = None
        self._idle.clear()
        self._wake.set()

    def fork(self, parent: Entry, at: int) -> Session:
        """Fork a session; see `Room.fork`."""
        return self._room.fork(parent, at)

    def forget(self, entry: Entry) -> None:
        """Drop what is remembered about a session that ended."""
        self._queued.pop(entry, None)
        self._room.forget(entry)
        if self._room.num_waiting:
            # Its pages are free now.
            self._wake.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is queued or running."""
        await self._idle.wait()

    async def run(self) -> None:
        """Run passes until cancelled."""
        try:
            while True:
                await self._wait_for_work()
                self._wake.clear()
                while self._may_pick() and (picks := self._scheduler.pick(self._candidates())):
                    await self._begin(picks)
                if not (self._unfinished or self._room.num_waiting or self._wake.is_set()):
                    self._idle.set()
        finally:
            for task in self._ending:
                task.cancel()
            self._engine_thread.stop()
            self._finish_thread.stop()

    async def _wait_for_work(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience()):
                await self._wake.wait()

    def _patience(self) -> float | None:
        """Give the seconds after which to look for work though nobody kicked; `None` is for ever."""
        waits = []
        if self._room.num_waiting:
            # Steps that wait for pages may go, or are to be refused, once some time has passed.
            waits.append(PAGES_RETRY_SECONDS)
        if self._queued and 0 < self._unfinished < self._passes.depth:
            waits.append(self._pace.wait_seconds(self._clock()))
        # A wait that is over already has found nothing to do.
        return min((wait for wait in waits if wait > 0), default=None)

    def _may_pick(self) -> bool:
        """Say whether the next pass is to be made ready now."""
        if not self._unfinished:
            return True
        return self._unfinished < self._passes.depth and self._pace.wait_seconds(self._clock()) <= 0

    def _candidates(self) -> list[Candidate[Entry]]:
        rows = {entry: entry.session.ready_rows() if entry.verified else () for entry in self._queued}
        self._queued = {entry: None for entry in rows if rows[entry]}
        return [
            Candidate(entry, entry.owner, rows[entry], entry.session.queued[0].arrived)
            for entry in self._room.ready(list(self._queued))
        ]

    # One pass

    async def _begin(self, picks: Sequence[Pick[Entry]]) -> None:
        """Stage, plan and start a pass; a task of its own sees to its end."""
        self._unfinished += 1
        picked = self._clock()
        try:
            ending = await self._start(picks)
        except Exception as error:
            ending = None
            self._fail(picks, error)
        if ending is None:
            self._ended()
            return
        self._pace.started(picked, self._clock())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _start(self, picks: Sequence[Pick[Entry]]) -> asyncio.Task[None] | None:
        batch = [(pick.key, step) for pick in picks for step in pick.key.session.start(pick.steps)]
        steps = [step for _, step in batch]
        staged = await self._engine_thread.run(self._passes.stage, steps)
        shares = self._plan(batch, staged.errors)
        if not shares:
            return None
        kept = [index for share in shares for index in share.indices]
        plan = self._engine.plan([share.run for share in shares])
        # One thread does both where nothing can overlap: another hop would only cost time.
        work = self._start_pass if self._passes.depth > 1 else self._start_and_finish
        # Queued here and now, so that passes start in the order of their plans.
        started = self._engine_thread.run(work, plan, staged, kept)
        return asyncio.create_task(self._end(_Pass(picks, steps, plan.edits, shares, kept), started), name="pass")

    def _start_pass(self, plan: BatchPlan, staged: Any, kept: Sequence[int]) -> Any:
        try:
            return self._passes.start(plan, staged, kept)
        except Exception as error:
            # Now, because the next pass builds on these edits.
            self._engine.cache.settle(plan.edits)
            if is_out_of_memory(error):
                give_back(error)
            raise

    def _start_and_finish(self, *arguments: Any) -> Outcome:
        return self._passes.finish(self._start_pass(*arguments))

    async def _end(self, one: _Pass, started: asyncio.Future[Any]) -> None:
        try:
            outcome = await started
            if self._passes.depth > 1:
                outcome = await self._finish_thread.run(self._passes.finish, outcome)
            self._faults_in_a_row = 0
            self._pace.finished(outcome.model_seconds, self._clock(), self._unfinished - 1)
            self._deliver(one, outcome)
        except Exception as error:
            self._fail(one.picks, error)
            self._room.lose_uncopied(one.edits, self._engine.cache.holds)
        finally:
            self._ended()

    def _ended(self) -> None:
        self._unfinished -= 1
        self._wake.set()

    # Pages

    def _plan(self, batch: Sequence[tuple[Entry, Step]], errors: Sequence[FlLlamaError | None]) -> list[_Share]:
        shares: list[_Share] = []
        given_up: set[str] = set()
        for index, ((entry, step), error) in enumerate(zip(batch, errors, strict=True)):
            if entry.session.phase is not Phase.ACTIVE or entry.ident in given_up:
                continue
            try:
                if error is not None:
                    raise error
                run = self._room.plan(entry, step)
            except FlLlamaError as refusal:
                given_up.add(entry.ident)
                if isinstance(refusal, OutOfPages) and self._room.may_wait(entry, step):
                    entry.session.postpone(step)
                else:
                    self._refuse(entry, step, refusal)
                continue
            if shares and shares[-1].entry is entry:
                share = shares[-1]
                share.run = replace(run, first=share.run.first, count=share.run.count + run.count)
                share.indices.append(index)
            else:
                shares.append(_Share(entry, [index], run))
        return shares

    def _refuse(self, entry: Entry, step: Step, error: FlLlamaError) -> None:
        for seq, refusal in entry.session.refuse(step, error):
            self._metrics.refusals.labels(type(refusal).__name__).inc()
            entry.send(error_frame(entry.handle, seq, refusal))
        self._settle(entry)

    # Results

    def _deliver(self, one: _Pass, outcome: Outcome) -> None:
        replies = iter(outcome.replies)
        now = self._clock()
        for share in one.shares:
            entry = share.entry
            for index in share.indices:
                step, reply = one.steps[index], next(replies)
                if entry.session.phase is not Phase.ACTIVE:
                    continue
                if isinstance(reply, ServerFault):
                    self._lose(entry, step, reply)
                    continue
                entry.session.complete(step, reply)
                entry.send(reply)
                self._note_decode(entry, step, outcome.model_seconds, now)
                self._figures.replied(entry, step, now)
            entry.active_at = now
            self._settle(entry)
        kept = [one.steps[index] for index in one.kept]
        self._figures.passed(kept, len(one.shares), outcome.model_seconds, now)

    def _note_decode(self, entry: Entry, step: Step, model_seconds: float, now: float) -> None:
        """Tell the background what a token takes by itself: the edge's and the link's time, and the model's."""
        if step.is_decode and entry.last_reply_at is not None:
            self.background.quanta.decoded(now, step.arrived - entry.last_reply_at + model_seconds)

    def _settle(self, entry: Entry) -> None:
        """Say what was held back while steps were running; what was queued meanwhile may go now."""
        answer = entry.session.finish()
        if answer is not None:
            entry.send(answer)
        if entry.session.queued:
            self.kick(entry)

    def _fail(self, picks: Sequence[Pick[Entry]], error: Exception) -> None:
        """Lose the sessions of a pass that failed: their pages cannot be trusted, everybody else's can."""
        log.exception("a pass failed sessions=%d", len(picks))
        self._faults_in_a_row += 1
        self._metrics.faults.inc()
        self._metrics.out_of_memory.inc(is_out_of_memory(error))
        fault = ServerFault("the server failed while it computed this step; its log says more", retry_after_ms=1000)
        for pick in picks:
            if pick.key.session.running:
                self._lose(pick.key, pick.key.session.running[0], fault)

    def _lose(self, entry: Entry, step: Step, fault: ServerFault) -> None:
        self._metrics.refusals.labels(type(fault).__name__).inc()
        entry.send(error_frame(entry.handle, step.seq, fault))
        entry.session.lose()
        self._room.forget(entry)
        if entry.mailbox is not None:
            entry.send(entry.session.resync())


def _settler(device: torch.device) -> Callable[[], None]:
    """Give what waits until the device has done all that it was told."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
