"""The course of a job from one (re)start to the next: messages go into its books, and what they say is to be done is.

Everything here is void with the next start; weights, counts and seats outlive it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from split_llama.errors import BadRequest, BadStates, FlLlamaError, LimitExceeded, RequestRefused
from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.control import Request
from split_llama.wire.frame import Kind
from split_llama.wire.training import Answer, Backward, Commit, Forward, Message, Outcome
from training.job_config import JobConfig
from training.roster import Roster
from training.server.adapters import AdapterPlan
from training.server.book import Book, CloseStep, GoBack, Meet, RunForward, Work
from training.server.budget import Budget
from training.server.clock import JobClock
from training.server.engine import Engine
from training.server.ledger import Ledger
from training.server.letters import mean_loss, outcome
from training.server.member import Member
from training.server.records import Cohort, Micro, Phase, Rows, Share
from training.server.sets import Stepped
from training.server.tally import Meters, Tally
from training.strategy import Strategy, averages

R = TypeVar("R", bound=Request)


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What does not change while a job lives."""

    config: JobConfig
    strategy: Strategy
    plan: AdapterPlan
    engine: Engine
    roster: Roster
    members: Mapping[int, Member]
    tally: Tally
    meters: Meters
    budget: Budget
    clock: JobClock


class Course:
    """`steps` gives the step after which each client that takes part goes on."""

    def __init__(self, terms: Terms, generation: int, steps: Mapping[int, int]) -> None:
        self.generation = generation
        self.present = frozenset(steps)
        self.ledger = Ledger(terms.config, terms.strategy, steps, terms.clock.now())
        self.book = Book(terms.config, terms.strategy, self.ledger)
        self._terms = terms
        self._codec = Codec.parse(terms.config.codec)
        self._gradient_codec = Codec.parse(terms.config.gradient_codec)

    def drop_tapes(self) -> None:
        """Give the tapes' memory back: the course is over, or paused, and then they are computed once more."""
        for cohort in self.book.cohorts:
            cohort.drop_tape()

    # What comes

    def take(self, member: Member, index: int, message: Message) -> None:
        """Take a client's message; one of another generation is dropped. Raises `RequestRefused`."""
        match message.kind:
            case Kind.FORWARD:
                self._take_forward(index, message)
            case Kind.BACKWARD:
                self._take_backward(member, index, message)
            case Kind.STEP:
                self._take_commit(index, message)

    def _header(self, kind: type[R], message: Message, index: int) -> R | None:
        header = kind.from_bytes(message.header)
        current = getattr(header, "generation", None) == self.generation and index in self.present
        return header if current else None

    def _take_forward(self, index: int, message: Message) -> None:
        config, header = self._terms.config, self._header(Forward, message, index)
        if header is None:
            return
        rows = sum(header.lengths)
        if message.count != rows or len(header.lengths) > config.batch_size or max(header.lengths) > config.max_length:
            raise BadStates(
                f"expected the rows of at most {config.batch_size} sequences of at most {config.max_length} tokens; "
                f"{message.count} rows for the lengths {list(header.lengths[:8])} (sum {rows}) came"
            )
        if header.targets > rows:
            raise BadRequest(f"{header.targets} target tokens cannot be in {rows} rows")
        least, limit = self._terms.engine.least_bytes(header.lengths), self._terms.budget.limit
        if least > limit:
            raise LimitExceeded(
                f"a micro-batch of {rows} rows holds {least} bytes here, of {limit} that may be; use a smaller "
                "batch_size or max_length, or give the server more memory for fine-tuning"
            )
        self.ledger.forward(index, header, message.seq, _rows(message), self._terms.clock.now())

    def _take_backward(self, member: Member, index: int, message: Message) -> None:
        header = self._header(Backward, message, index)
        if header is not None:
            rows = _rows(message) if message.count else None
            answer = self.ledger.backward(index, header, message.seq, rows, self._terms.clock.now())
            if answer is not None:
                member.send_again(answer)

    def _take_commit(self, index: int, message: Message) -> None:
        header = self._header(Commit, message, index)
        if header is None:
            return
        expected = self._commit_rows(header.step)
        if message.count != expected or (message.count and message.codec is not Codec.FP32):
            # Nobody waits for a better one: the others go on without it.
            self.ledger.reject(index, header.step)
            raise BadStates(
                f"expected {expected} rows of A's and C's adapters in fp32, {message.count} in {message.codec.label} "
                "came; rank or target modules differ, or the step is another one"
            )
        rows = _rows(message) if message.count else None
        self.ledger.commit(index, header, rows, self._terms.clock.now())

    def _commit_rows(self, step: int) -> int:
        terms = self._terms
        if terms.strategy.own_sets and not averages(terms.config, terms.strategy, step):
            return 0
        return terms.plan.end_rows

    # What is done

    async def advance(self) -> bool:
        """Do the next thing, if there is one; say whether there was."""
        work = self.book.next(self._terms.clock.now(), self._terms.engine.room)
        if work is not None:
            await self._do(work)
        return work is not None

    async def _do(self, work: Work) -> None:
        match work:
            case RunForward(cohort):
                await self._forward(cohort)
            case GoBack(cohort):
                await self._backward(cohort)
            case CloseStep():
                await self._close(work)
            case Meet():
                await self._meet(work)

    async def _forward(self, cohort: Cohort) -> None:
        results = await self._terms.engine.forward(cohort)
        for micro, rows in results.rows.items():
            self._answer(micro, Kind.FORWARD, micro.seq, self._codec, rows)
        for micro, failure in results.failures.items():
            self._void(micro, micro.seq, failure)
        self.book.ran(cohort, self._terms.clock.now())

    async def _backward(self, cohort: Cohort) -> None:
        if cohort.tape is None and any(micro.phase is Phase.RETURNED for micro in cohort.members):
            self._terms.meters.recomputed.inc()
        results = await self._terms.engine.backward(cohort)
        for micro, rows in results.rows.items():
            micro.settle(Phase.DONE, self._answer(micro, Kind.BACKWARD, micro.back_seq, self._gradient_codec, rows))
            self.ledger.forget_answers(micro)
        for micro, failure in results.failures.items():
            self._void(micro, micro.back_seq, failure)
        self.book.went_back(cohort, self._terms.clock.now())

    def _answer(self, micro: Micro, kind: Kind, seq: int, codec: Codec, rows: bytes) -> Message | None:
        member = self._terms.members.get(micro.client)
        if member is None:
            return None
        header = Answer(generation=self.generation, step=micro.step, micro=micro.number)
        return member.send(kind, seq, header, codec, rows)

    def _void(self, micro: Micro, seq: int, failure: RequestRefused) -> None:
        micro.settle(Phase.VOID)
        self._terms.meters.void.inc()
        self._refuse(micro.client, seq, failure)

    def _refuse(self, client: int, seq: int, failure: FlLlamaError) -> None:
        member = self._terms.members.get(client)
        if member is not None:
            member.refuse(seq, failure)

    async def _close(self, work: CloseStep) -> None:
        terms = self._terms
        if terms.strategy.own_sets:
            # Its weights change now: tapes of cohorts that wait for others read them no more.
            self.book.forget(work.track.clients[0])
        stepped = await terms.engine.step(work.step, work.shares, work.left)
        loss = mean_loss(work.shares, stepped.skipped)
        self._count(work.shares, stepped, loss)
        self._count_left(work.left)
        rows = b"" if terms.strategy.own_sets else await self._end_rows()
        outcomes = {
            client: outcome(self.generation, work.step, client, work.shares, stepped, loss)
            for client in work.track.clients
        }
        self.book.close(work, terms.clock.now())
        self._note_shares(work.step, [share.client for share in work.shares])
        self._tell(outcomes, rows)

    async def _meet(self, work: Meet) -> None:
        terms = self._terms
        for client in self.present:
            self.book.forget(client)
        met = await terms.engine.meet(work.step, work.shares)
        losses = {}
        for share in work.shares:
            losses[share.client] = mean_loss([share], met.steps[share.client].skipped)
            self._count([share], met.steps[share.client], losses[share.client])
        terms.tally.loss = mean_loss(work.shares, met.skipped)
        rows = await self._end_rows()
        self.book.met(work, terms.clock.now())
        self._note_shares(work.step, [share.client for share in work.shares])
        for share in work.shares:
            client = share.client
            told = outcome(self.generation, work.step, client, [share], met.steps[client], losses[client])
            if client in met.skipped:
                told = told.model_copy(update={"included": False})
                self._skip(client)
            self._tell({client: told}, rows)
        for client, steps in work.left.items():
            self._count_left([client])
            for step in steps:
                missed = Outcome(generation=self.generation, step=step, included=False)
                self._tell({client: missed}, rows if step == work.step else b"")

    def _note_shares(self, step: int, clients: Iterable[int]) -> None:
        for client in clients:
            self._terms.roster.had_share(client, step)

    async def _end_rows(self) -> bytes:
        if not self._terms.plan.ends:
            return b""
        return encode_rows(Codec.FP32, await self._terms.engine.end_rows())

    def _tell(self, outcomes: Mapping[int, Outcome], rows: bytes) -> None:
        roster = self._terms.roster
        for client, told in outcomes.items():
            member = self._terms.members.get(client)
            if member is not None:
                member.send(Kind.REPLY, told.step, told, Codec.FP32, rows)
                roster.closed(client, told.step)
            elif self._terms.config.deadline_seconds is not None:
                roster.missed(client)

    # What is counted

    def _count(self, shares: Iterable[Share], stepped: Stepped, loss: float | None) -> None:
        tally, meters = self._terms.tally, self._terms.meters
        tally.loss = loss
        meters.steps.inc()
        tally.skipped += stepped.stayed is not None
        for share in shares:
            if share.client in stepped.skipped:
                self._skip(share.client)
            elif share.commit is not None:
                targets, samples = share.targets, share.samples
                tally.tokens += targets
                tally.samples += samples
                tally.member(share.client).samples += samples
                meters.tokens.inc(targets)
                meters.samples.inc(samples)
        for client in stepped.clipped:
            tally.member(client).clipped += 1
            meters.clipped.inc()

    def _skip(self, client: int) -> None:
        self._terms.tally.member(client).skipped += 1
        self._terms.meters.skipped.inc()

    def _count_left(self, clients: Iterable[int]) -> None:
        for client in clients:
            self._terms.tally.member(client).left_out += 1
            self._terms.meters.left_out.inc()
            self._terms.roster.missed(client)


def _rows(message: Message) -> Rows:
    return Rows(message.codec, message.count, message.rows)
