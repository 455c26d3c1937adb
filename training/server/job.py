"""The life of a job: it starts and starts again, step after step, is paused and resumed, and ends.

One task does all work, one thing after the other; what comes in between only changes the books and wakes it. So
whatever the task awaits, nobody else moves weights, and a failure of one job ends that job alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from split_llama.errors import FlLlamaError, NotOwner
from split_llama.extension import Host, Send
from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.training import Join, Message
from training.roster import Restart, Roster
from training.server.adapters import AdapterPlan
from training.server.budget import Budget
from training.server.clock import JobClock
from training.server.course import Course, Terms
from training.server.engine import Engine, MakeTrunk
from training.server.keeper import Keeper
from training.server.keys import hash_secret
from training.server.lobby import Lobby, Names
from training.server.member import Member
from training.server.store import JobFolder, JobRecord
from training.server.tally import Meters
from training.strategy import checkpoint_due, last_average, make_strategy

DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
# A job that nobody has joined so long after it was made is cancelled.
UNJOINED_DAYS = 7

log = logging.getLogger("fl_llama.training")


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """What all jobs of a server share. `clock` gives monotonic seconds."""

    host: Host
    budget: Budget
    meters: Meters
    make_trunk: MakeTrunk
    clock: Callable[[], float]


class Job:
    """One job, from its creation or loading to its end and after it."""

    def __init__(self, record: JobRecord, folder: JobFolder, around: Surroundings) -> None:
        """Raises `UsageError` for a strategy that cannot be made here."""
        config, host = record.config, around.host
        strategy = make_strategy(config)
        if record.generation == 0:
            # Before the job began a seat lasts as long as its connection.
            record.seats.clear()
        self.record = record
        self.roster = Roster(
            config.clients,
            config.rejoin_seconds,
            lambda step: checkpoint_due(config, step, strategy),
            record.seats,
            begun=record.generation > 0,
        )
        self._wake = asyncio.Event()
        self._clock = JobClock(around.clock, record.seconds)
        plan = AdapterPlan.of(host.checkpoint.config, config)
        self.lobby = Lobby(record, self.roster, plan, host, self._clock, self._wake.set)
        names = Names(self.roster)
        self._engine = Engine(host, config, plan, around.budget, around.make_trunk, names, own_sets=strategy.own_sets)
        self.keeper = Keeper(record, folder, host, self._engine, plan, self._clock, around.meters)
        self._terms = Terms(
            config,
            strategy,
            plan,
            self._engine,
            self.roster,
            self.lobby.members,
            record.tally,
            around.meters,
            around.budget,
            self._clock,
        )
        self._course: Course | None = None
        self._life: asyncio.Task[None] | None = None
        self._closing = False
        if record.paused:
            self._clock.stop()

    # For REST

    @property
    def state(self) -> str:
        """Say where the job is in its life: waiting, running, paused, done, failed or cancelled."""
        if self.record.ended is not None:
            return self.record.ended
        if self.record.paused:
            return "paused"
        return "waiting" if self._course is None or not self.lobby.members or self.roster.is_waiting else "running"

    @property
    def activation_bytes(self) -> int:
        """Bytes of tapes, of states and gradients that wait, and of messages half received or half sent."""
        waiting = self._course.ledger.input_bytes if self._course is not None else 0
        return waiting + self._engine.held_bytes + sum(member.nbytes for member in self.lobby.members.values())

    @property
    def seconds(self) -> float:
        """How long the job has been going, pauses left out."""
        return self.record.seconds if self.record.ended is not None else self._clock.now()

    def step_of(self, index: int) -> int:
        """Give the newest step that is closed for a client."""
        course = self._course
        return course.ledger.closed(index) if course is not None and index in course.present else self.record.step

    def has_key(self, key: str | None) -> bool:
        """Say whether this is the job's key."""
        return key is not None and hmac.compare_digest(hash_secret(key), self.record.key)

    async def pause(self) -> None:
        """Stand still until `resume`: what comes waits. Raises `JobEnded`."""
        self.lobby.check_alive()
        self.record.paused = True
        self._clock.stop()
        self._wake.set()
        await self.keeper.write()

    async def resume(self) -> None:
        """Go on. Raises `JobEnded`."""
        self.lobby.check_alive()
        self.record.paused = False
        self._clock.go()
        self._wake.set()
        await self.keeper.write()

    async def cancel(self) -> None:
        """End the job before its time; the adapters stay as they are now. Raises `JobEnded`."""
        self.lobby.check_alive()
        self._give_up(None)

    def _give_up(self, reason: str | None) -> None:
        self.record.ended, self.record.reason = CANCELLED, reason
        self._wake.set()

    async def over(self) -> None:
        """Wait until a job that has ended has put everything in order."""
        if self._life is not None:
            await asyncio.wait({self._life})

    # Clients

    def join(self, seq: int, join: Join, send: Send) -> Member:
        """Let a client in. Raises `NotOwner` for another key, and what `Lobby.join` does."""
        if not self.has_key(join.key):
            raise NotOwner(f"this is not the key of the job {self.record.id}; its creator was given it")
        return self.lobby.join(seq, join, send, self._take, self._is_busy)

    def _take(self, index: int, member: Member, message: Message) -> None:
        """Take a message of a client that has joined. Raises `RequestRefused`."""
        if self._course is not None and not self.roster.seats[index].fresh:
            try:
                self._course.take(member, index, message)
            finally:
                self._wake.set()

    def _is_busy(self, index: int) -> bool:
        course = self._course
        waits_for_start = course is None or index not in course.present or self.roster.seats[index].fresh
        return waits_for_start or (course is not None and course.ledger.is_busy(index))

    # Life

    def start(self) -> None:
        """Begin to work."""
        if self.record.ended is None:
            self._terms.budget.listeners.add(self._wake.set)
            self._life = asyncio.get_running_loop().create_task(self._live(), name=f"life-of-{self.record.id}")

    async def close(self) -> None:
        """The server ends: stop in an orderly way; the job goes on when the server is back."""
        self._closing = True
        self.lobby.close()
        self._wake.set()
        if self._life is not None:
            await self._life

    async def _live(self) -> None:
        try:
            await self.keeper.look()
            while not self._closing and self.record.ended is None:
                if not await self._advance():
                    await self._sleep()
        except FlLlamaError as error:
            log.error("job failed id=%s: %s", self.record.id, error.message)
            self.record.ended, self.record.reason = FAILED, error.message
        except Exception as error:
            log.exception("job failed id=%s", self.record.id)
            self.record.ended, self.record.reason = FAILED, f"the server failed: {type(error).__name__}; see its log"
        await self._finish()

    async def _advance(self) -> bool:
        """Do the next thing; say whether there was one."""
        if self._unjoined_for() <= 0.0:
            self._give_up(f"nobody joined it within {UNJOINED_DAYS} days")
            return True
        if self.record.paused:
            if self._course is not None:
                self._course.drop_tapes()
            return False
        restart = await self._decide()
        if restart is not None:
            await self._restart(restart)
            return True
        course = self._course
        # Without a deadline nobody goes ahead of who is expected back: it could not follow.
        still = self.roster.is_waiting and self._terms.config.deadline_seconds is None
        if course is None or still or not await course.advance():
            return False
        await self._after_work(course)
        return True

    async def _after_work(self, course: Course) -> None:
        step = min(course.ledger.closed(index) for index in course.present)
        if step == self.record.step:
            return
        self.record.step = step
        if checkpoint_due(self._terms.config, step, self._terms.strategy):
            await self.keeper.save(step)
        if course.ledger.is_complete:
            self.record.ended = DONE

    async def _sleep(self) -> None:
        """Wait until something comes, or somebody's time is over."""
        now, due = self._clock.now(), [self.roster.wakes_at()]
        if self._course is not None:
            due.append(self._course.book.wakes_at)
        times = [at - now for at in due if at is not None and not self.record.paused]
        timeout = max(0.0, min((*times, self._unjoined_for())))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout if timeout < math.inf else None):
                await self._wake.wait()
        self._wake.clear()

    def _unjoined_for(self) -> float:
        """Say in how many seconds the job ends because nobody ever joined it."""
        if self.record.generation > 0 or self.roster.seats:
            return math.inf
        return self.record.created + UNJOINED_DAYS * 86400 - time.time()

    async def _decide(self) -> Restart | None:
        if not self.roster.is_due:
            return None
        # What is being written counts, if it is written.
        await self.keeper.settle()
        live = self._held()
        average = max(live.values(), default=0)
        if self._terms.strategy.own_sets:
            average = last_average(self._terms.config, self._terms.strategy, self.record.step)
        return self.roster.decide(live, self.keeper.kept, average, self._clock.now())

    def _held(self) -> dict[int, int]:
        """Give the step that the server holds for each seat; nothing before the first start."""
        course = self._course
        if course is None or not self._engine.has_state:
            return {}
        if self._terms.strategy.own_sets:
            return {index: course.ledger.closed(index) for index in course.present}
        return dict.fromkeys(self.roster.seats, self.record.step)

    async def _restart(self, restart: Restart) -> None:
        record, held = self.record, self._held()
        self.lobby.renumber()
        self._end_course()
        if restart.checkpoint is not None:
            await self.keeper.restore(restart.checkpoint, restart.steps)
        else:
            # Who goes on from another step than that of its set gets a new one.
            await self._engine.go_on(index for index, step in restart.steps.items() if held.get(index) == step)
            await self._engine.go_on(restart.steps)
        record.generation = max(record.generation, self.lobby.newest) + 1
        record.step = min(restart.steps.values())
        await self.keeper.write()
        rows = await self._known_ends(restart)
        self._course = Course(self._terms, record.generation, restart.steps)
        how = "live" if restart.checkpoint is None else "restored"
        present = len(restart.steps)
        log.info("job starts id=%s step=%d clients=%d state=%s", record.id, record.step, present, how)
        self.lobby.tell_start(record.generation, restart, rows)
        if self._course.ledger.is_complete:
            # The server was killed between the last checkpoint and the word that the job is done.
            record.ended = DONE

    async def _known_ends(self, restart: Restart) -> dict[int, bytes]:
        """Give A's and C's weights, where they are shared, at the steps at which the server knows them.

        With own sets that is where all met; in between each client has its own.
        """
        terms = self._terms
        if not terms.plan.ends:
            return {}
        rows = encode_rows(Codec.FP32, await self._engine.end_rows())
        own, steps = terms.strategy.own_sets, set(restart.steps.values())
        return {step: rows for step in steps if not own or step == last_average(terms.config, terms.strategy, step)}

    def _end_course(self) -> None:
        if self._course is not None:
            self._course.drop_tapes()
        self._course = None

    async def _finish(self) -> None:
        """End in order: for good, or until the server is back."""
        self._terms.budget.listeners.discard(self._wake.set)
        self._end_course()
        await self.keeper.settle()
        if self.record.ended is not None:
            self.record.seconds = self._clock.now()
            await self._keep_adapter()
            self._engine.release()
            self.lobby.dismiss(self.record.reason or self.record.ended)
        await self.keeper.write()

    async def _keep_adapter(self) -> None:
        """A failed job's adapters are those of its newest checkpoint: nobody knows what the failure left behind."""
        if self._engine.has_state and self.record.ended != FAILED:
            try:
                await self.keeper.keep_adapter()
            except FlLlamaError as error:
                log.error("job keeps no adapters id=%s: %s", self.record.id, error.message)
