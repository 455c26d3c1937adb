"""A client's life in a job: joined, started, step after step, started again where somebody was lost, and the end.

The server decides from which step on everybody goes on (Start); each Start makes a `Generation` of work. Everything of
model and state runs in one thread, first in, first out; here is only who waits for what.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from split_llama.errors import BadRequest, CheckpointError, JobEnded, NotOwner, UnknownJob, UnknownSession
from split_llama.wire.frame import Kind
from split_llama.wire.training import End, Joined, Message, Outcome, Start
from training.client.exchange import Exchange
from training.client.generation import Closed, Generation, Member
from training.client.link import JobLink, Lost, Refused
from training.client.pipeline import Pipeline
from training.client.report import Reporter, StepRecord

MakeMember = Callable[[Joined], tuple[Member, Pipeline]]
FINAL = (JobEnded, UnknownJob, NotOwner, UnknownSession)


class JobLoop:
    """One client in one job. `make_member` is called with the server's answer to each JOIN."""

    def __init__(self, link: JobLink, make_member: MakeMember, watcher: Reporter) -> None:
        self.generation = 0
        self._link = link
        self._make_member = make_member
        self._watcher = watcher
        self._member: Member | None = None
        self._pipeline: Pipeline | None = None
        self._work: Generation | None = None
        self._task: asyncio.Task[None] | None = None
        # Steps whose state the server asked for in vain, until work goes on again.
        self._missing: set[int] = set()
        self._is_joining_again = False
        self._began = self._heard_at = time.monotonic()
        self._left_out = self._clipped = self._void = 0

    @property
    def quiet_seconds(self) -> float:
        """For how long nothing has come from the server."""
        return time.monotonic() - self._heard_at

    async def run(self) -> str:
        """Take part until the server ends the job; give its reason. Raises `FlLlamaError`."""
        try:
            async for event in self._link.events():
                self._heard_at = time.monotonic()
                if isinstance(event, Joined):
                    self._member, self._pipeline = self._make_member(event)
                    self._is_joining_again = False
                elif isinstance(event, Lost):
                    await self._stop()
                    if not self._is_joining_again:
                        self._watcher.note(f"the server was lost ({event.error.message}); trying to reach it again")
                elif isinstance(event, Refused):
                    self._refused(event)
                elif (reason := await self._message(event)) is not None:
                    return reason
            raise AssertionError("the link's events have no end of their own")
        finally:
            await self._stop()

    async def _message(self, message: Message) -> str | None:
        """Take a message; give the reason if it is the end."""
        match message.kind:
            case Kind.RESYNC if not self._is_joining_again:
                await self._begin(Start.from_bytes(message.header), message)
            case Kind.FORWARD | Kind.BACKWARD if self._work is not None:
                self._work.exchange.answered(message)
            case Kind.REPLY:
                await self._close(Outcome.from_bytes(message.header), message)
            case Kind.CLOSE:
                return End.from_bytes(message.header).reason if message.header else "the server closed the job"
        return None

    async def _begin(self, start: Start, message: Message) -> None:
        """(Re)start: give up what is under way, restore, and go on."""
        await self._stop()
        member, pipeline = self._member, self._pipeline
        if member is None or pipeline is None:
            raise BadRequest("the server started the job before it answered JOIN")
        weights = member.weights_of(message)
        take = member.state.restore if start.restore else member.state.go_on
        try:
            await member.compute(lambda: take(start.step, weights))
        except CheckpointError as missing:
            self._ask_for_another(start.step, missing)
            return
        self._missing.clear()
        if not self.generation:
            # Waiting for the others is no training.
            self._began = time.monotonic()
        if self.generation or start.step:
            self._watcher.note(f"going on after step {start.step} with {len(start.present)} clients")
        self.generation = start.generation
        exchange = Exchange(self._link.send, member.width, start.generation)
        self._work = Generation(member, pipeline, exchange, start)
        self._task = asyncio.create_task(self._work.run(), name=f"generation-{start.generation}")
        self._task.add_done_callback(self._ended)

    def _ask_for_another(self, step: int, missing: CheckpointError) -> None:
        """JOIN again: the server took for granted what could not be written here. Raises `CheckpointError` at last."""
        if step in self._missing:
            raise CheckpointError(
                f"{missing.message}. The server was told so and asks for it again, so this client leaves. Come back "
                "with the same command to take part from the newest state there is here"
            ) from missing
        self._missing.add(step)
        self._is_joining_again = True
        self._watcher.note(f"{missing.message}; joining again with what there is")
        self._link.join_again(f"the state after step {step} could not be restored here")

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Work that fails ends the client; it says so where events are waited for."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._link.fail(failure)

    async def _stop(self) -> None:
        """Give up what is under way."""
        if self._work is not None:
            await self._work.conclude()
        task, self._task, self._work = self._task, None, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})

    async def _close(self, outcome: Outcome, message: Message) -> None:
        if self._work is None or outcome.generation != self.generation:
            return
        self._tell(await self._work.close(outcome, message))

    def _tell(self, closed: Closed) -> None:
        """Report a step."""
        outcome, share = closed.outcome, closed.share
        faults = share.faults if share is not None else ()
        self._left_out += not outcome.included and share is not None
        self._clipped += outcome.clipped_from is not None
        self._void += len(faults)
        for fault in faults:
            self._watcher.note(f"step {outcome.step}: a micro-batch adds nothing: {fault}")
        for warning in closed.warnings:
            self._watcher.note(warning)
        if outcome.skipped:
            self._watcher.note(f"step {outcome.step}: the shared weights stay as they are: {outcome.skipped}")
        mean = None if share is None or share.loss is None or not share.targets else share.loss / share.targets
        self._watcher.step(
            StepRecord(
                step=outcome.step,
                generation=outcome.generation,
                loss=mean,
                job_loss=outcome.loss,
                learning_rate=outcome.learning_rate,
                tokens=share.tokens if share is not None else 0,
                samples=share.samples if share is not None else 0,
                bytes_up=self._link.bytes_up,
                bytes_down=self._link.bytes_down,
                seconds=round(time.monotonic() - self._began, 3),
                contributed=share is not None,
                left_out=self._left_out,
                clipped=self._clipped,
                void=self._void,
                skipped=outcome.skipped,
            )
        )

    def _refused(self, refused: Refused) -> None:
        """Take a refusal that is about one message, or about all."""
        if self._work is not None and self._work.exchange.refused(refused.seq, refused.error):
            return
        if isinstance(refused.error, FINAL):
            raise refused.error
        self._watcher.note(f"the server refused a message: {refused.error.message}")
