"""The engine loop: one task that picks steps, and one thread that computes them.

The loop owns sessions and pages; the thread gets immutable plans. A pass is

    loop: pick -> thread: decode, check for NaN -> loop: pages, plan -> thread: run, encode -> loop: deliver

so that a bad step fails alone before any page changes, and nothing but the thread ever computes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from serving.metrics import Metrics
from serving.passes import Outcome, Passes, Staged
from serving.reclaim import idle_longest
from serving.registry import Entry, Registry
from serving.scheduler import Candidate, Pick, Scheduler
from serving.session import Phase
from serving.steps import Step
from split_llama.engine.engine import Engine
from split_llama.engine.plan import BatchPlan, SequenceRun
from split_llama.errors import FlLlamaError, OutOfPages, ServerFault
from split_llama.wire.control import error_frame

T = TypeVar("T")
FAULTS_UNTIL_UNHEALTHY = 3

log = logging.getLogger("fl_llama.worker")


@dataclass(slots=True)
class _Share:
    """One session's part of a pass: its steps, as indices into the batch, and their run of rows."""

    entry: Entry
    indices: list[int]
    run: SequenceRun


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
    ) -> None:
        self._engine = engine
        self._passes = passes
        self._registry = registry
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._evict_after = evict_after
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pass_ended = 0.0
        self._faults_in_a_row = 0

    @property
    def is_healthy(self) -> bool:
        """Say no when one pass after the other fails: the device or the process needs a restart."""
        return self._faults_in_a_row < FAULTS_UNTIL_UNHEALTHY

    def kick(self) -> None:
        """Say that there may be work."""
        self._idle.clear()
        self._wake.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is queued or running."""
        await self._idle.wait()

    async def run(self) -> None:
        """Run passes until cancelled."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while picks := self._scheduler.pick(self._candidates()):
                    await self._run_pass(picks)
                if not self._wake.is_set():
                    self._idle.set()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _candidates(self) -> list[Candidate[Entry]]:
        candidates = []
        for entry in self._registry:
            if entry.verified and (rows := entry.session.ready_rows()):
                candidates.append(Candidate(entry, entry.owner, rows, entry.session.queued[0].arrived))
        return candidates

    async def _run_pass(self, picks: Sequence[Pick[Entry]]) -> None:
        batch = [(pick.key, step) for pick in picks for step in pick.key.session.start(pick.steps)]
        try:
            await self._compute(batch)
        except Exception:
            # Whatever failed, the pages of these sessions cannot be trusted; everybody else's can.
            log.exception("a pass failed steps=%d sessions=%d", len(batch), len(picks))
            self._fail([pick.key for pick in picks])

    async def _compute(self, batch: Sequence[tuple[Entry, Step]]) -> None:
        steps = [step for _, step in batch]
        staged = await self._in_thread(self._passes.stage, steps)
        shares = self._plan(batch, staged.errors)
        if not shares:
            return
        plan = self._engine.plan([share.run for share in shares])
        kept = [index for share in shares for index in share.indices]
        outcome = await self._in_thread(self._compute_pass, plan, staged, kept)
        self._faults_in_a_row = 0
        self._deliver(shares, steps, outcome)
        self._observe(outcome, [steps[index] for index in kept], len(shares))

    def _compute_pass(self, plan: BatchPlan, staged: Staged, kept: Sequence[int]) -> Outcome:
        return self._passes.finish(self._passes.start(plan, staged, kept))

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

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
                run = self._plan_step(entry, step)
            except FlLlamaError as refusal:
                given_up.add(entry.ident)
                self._refuse(entry, step, refusal)
                continue
            if shares and shares[-1].entry is entry:
                share = shares[-1]
                share.run = replace(run, first=share.run.first, count=share.run.count + run.count)
                share.indices.append(index)
            else:
                shares.append(_Share(entry, [index], run))
        return shares

    def _plan_step(self, entry: Entry, step: Step) -> SequenceRun:
        while True:
            try:
                return entry.session.plan(step)
            except OutOfPages:
                if not self._evict_one():
                    raise

    def _evict_one(self) -> bool:
        """Take the pages of the session that has been idle longest, if any has been for `evict_after` seconds."""
        entry = idle_longest(self._registry, self._clock() - self._evict_after)
        if entry is None:
            return False
        entry.session.lose()
        self._metrics.evictions.inc()
        return True

    def _refuse(self, entry: Entry, step: Step, error: FlLlamaError) -> None:
        for seq, refusal in entry.session.refuse(step, error):
            self._metrics.refusals.labels(type(refusal).__name__).inc()
            entry.send(error_frame(entry.handle, seq, refusal))
        self._finish(entry)

    # Results

    def _deliver(self, shares: Sequence[_Share], steps: Sequence[Step], outcome: Outcome) -> None:
        replies = iter(outcome.replies)
        now = self._clock()
        for share in shares:
            for index, reply in [(index, next(replies)) for index in share.indices]:
                entry, step = share.entry, steps[index]
                if entry.session.phase is not Phase.ACTIVE:
                    continue
                if isinstance(reply, ServerFault):
                    self._lose(entry, step, reply)
                    continue
                entry.session.complete(step, reply)
                entry.send(reply)
                self._observe_reply(entry, step, now)
            share.entry.active_at = now
            self._finish(share.entry)

    def _finish(self, entry: Entry) -> None:
        answer = entry.session.finish()
        if answer is not None:
            entry.send(answer)

    def _fail(self, entries: Sequence[Entry]) -> None:
        self._faults_in_a_row += 1
        self._metrics.faults.inc()
        fault = ServerFault("the server failed while it computed this step; its log says more", retry_after_ms=1000)
        for entry in entries:
            if entry.session.running:
                self._lose(entry, entry.session.running[0], fault)

    def _lose(self, entry: Entry, step: Step, fault: ServerFault) -> None:
        self._metrics.refusals.labels(type(fault).__name__).inc()
        entry.send(error_frame(entry.handle, step.seq, fault))
        entry.session.lose()
        if entry.mailbox is not None:
            entry.send(entry.session.resync())

    # Figures

    def _observe_reply(self, entry: Entry, step: Step, now: float) -> None:
        metrics = self._metrics
        metrics.steps.inc()
        if entry.last_reply_at is not None and step.is_decode:
            metrics.generation_tokens.inc(step.count)
            metrics.inter_token.observe(now - entry.last_reply_at)
        else:
            metrics.prompt_tokens.inc(step.count)
        if entry.last_reply_at is not None:
            entry.last_reply_at = now
        elif not entry.session.queued and not entry.session.running:
            metrics.first_token.observe(now - (entry.first_step_at or step.arrived))
            entry.last_reply_at = now

    def _observe(self, outcome: Outcome, steps: Sequence[Step], sequences: int) -> None:
        now, metrics = self._clock(), self._metrics
        metrics.pass_seconds.observe(outcome.model_seconds)
        metrics.pass_rows.observe(sum(step.count for step in steps))
        metrics.pass_sequences.observe(sequences)
        for step in steps:
            metrics.overhead.observe(max(0.0, now - max(step.arrived, self._pass_ended) - outcome.model_seconds))
        self._pass_ended = now
