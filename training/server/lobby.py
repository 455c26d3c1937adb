"""Who is there: clients that join a job, are checked and seated, get lost and leave; and the word to (re)start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

from split_llama.config import BlockRange
from split_llama.errors import BadRequest, FlLlamaError, PartitionNotAllowed
from split_llama.extension import Host, Send
from split_llama.wire.codec import Codec
from split_llama.wire.frame import Kind
from split_llama.wire.training import Join, Joined, Message, Start
from training.job_config import JobConfig
from training.roster import Restart, Roster
from training.server.adapters import AdapterPlan
from training.server.clock import JobClock
from training.server.keys import hash_secret
from training.server.member import Member, ended
from training.server.store import JobRecord

# How far a client's generation may be ahead of the one that the server knows: job.json's newest content can be lost.
MAX_GENERATIONS_AHEAD = 1000


class Lobby:
    """The members of one job by their numbers, and its roster. `wake` is called whenever that changes.

    `newest` is the highest generation that anybody was in, as far as is known.
    """

    def __init__(
        self,
        record: JobRecord,
        roster: Roster,
        plan: AdapterPlan,
        host: Host,
        clock: JobClock,
        wake: Callable[[], None],
    ) -> None:
        self.members: dict[int, Member] = {}
        self.roster = roster
        self.newest = record.generation
        self._record = record
        self._plan = plan
        self._host = host
        self._clock = clock
        self._wake = wake
        self._checks: set[asyncio.Task[None]] = set()

    @property
    def _config(self) -> JobConfig:
        return self._record.config

    @property
    def max_rows(self) -> int:
        """How many rows a micro-batch may have."""
        return self._config.batch_size * self._config.max_length

    def check_alive(self) -> None:
        """Raise `JobEnded` once the job is over."""
        if self._record.ended is not None:
            raise ended(f"is {self._record.ended}")

    def join(
        self,
        seq: int,
        join: Join,
        send: Send,
        take: Callable[[int, Member, Message], None],
        busy: Callable[[int], bool],
    ) -> Member:
        """Let a client in; what it holds is checked before JOIN is answered. Raises `JobEnded`, `PartitionNotAllowed`.

        Its messages go to `take`; `busy` says whether it has answers to come.
        """
        self.check_alive()
        blocks, plan = self._plan.blocks, self._plan
        if join.blocks != (blocks.start, blocks.stop):
            raise PartitionNotAllowed(f"the job trains blocks {blocks}; {list(join.blocks)} were asked for")
        member = Member(
            self,
            send,
            take,
            busy,
            width=plan.model.hidden_size,
            max_rows=max(self.max_rows, plan.end_rows),
            max_frame_bytes=self._host.max_frame_bytes,
        )
        check = asyncio.get_running_loop().create_task(self._let_in(member, seq, join), name="join")
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)
        return member

    async def _let_in(self, member: Member, seq: int, join: Join) -> None:
        try:
            await self._host.check_model(BlockRange(*join.blocks), join.geometry, join.weights, join.tokenizer)
            self.check_alive()
            if not member.gone:
                self._seat(member, join)
        except FlLlamaError as error:
            member.turn_away(seq, error)

    def _seat(self, member: Member, join: Join) -> None:
        known = self._record.generation
        if join.generation > known + MAX_GENERATIONS_AHEAD:
            raise BadRequest(f"generation {join.generation} of the job was never; {known} is the newest one known here")
        seat = self.roster.join(join.client, hash_secret(join.secret), join.samples, join.have, self._clock.now())
        self.newest = max(self.newest, known, join.generation)
        former = self.members.pop(seat.index, None)
        if former is not None:
            former.end("this client joined again from another connection")
        member.seat = seat
        self.members[seat.index] = member
        member.welcome(self._joined(seat.index))
        self._wake()

    def _joined(self, index: int) -> Joined:
        return Joined(index=index, max_micros=self._config.max_micros, max_rows=self.max_rows)

    def lost(self, member: Member) -> None:
        """A client's connection is gone."""
        if (index := self._unseat(member)) is not None:
            self.roster.lose(index, self._clock.now())

    def left(self, member: Member) -> None:
        """A client went for good."""
        if (index := self._unseat(member)) is not None:
            self.roster.leave(index)

    def _unseat(self, member: Member) -> int | None:
        seat = member.seat
        if seat is None or self.members.get(seat.index) is not member:
            return None
        del self.members[seat.index]
        self._wake()
        return seat.index

    def renumber(self) -> None:
        """Once all are there numbers follow from names: tell those whose number changed."""
        members = list(self.members.items())
        self.members.clear()
        for index, member in members:
            assert member.seat is not None, "members have seats"
            self.members[member.seat.index] = member
            if member.seat.index != index:
                member.welcome(self._joined(member.seat.index))

    def tell_start(self, generation: int, restart: Restart, rows: Mapping[int, bytes]) -> None:
        """Tell everybody where to go on; `rows` are A's and C's weights at a step, where they are known."""
        for index, step in restart.steps.items():
            member = self.members.get(index)
            if member is not None:
                start = Start(
                    generation=generation,
                    step=step,
                    present=tuple(sorted(restart.steps)),
                    restore=index in restart.restored,
                )
                member.send(Kind.RESYNC, generation, start, Codec.FP32, rows.get(step, b""))

    def close(self) -> None:
        """Let nobody in any more."""
        for check in self._checks:
            check.cancel()

    def dismiss(self, reason: str) -> None:
        """Tell everybody that the job is over."""
        for member in self.members.values():
            member.end(reason)
        self.members.clear()


class Names(Mapping[int, str]):
    """The clients' names by their numbers, as they are now."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def __getitem__(self, index: int) -> str:
        return self._roster.seats[index].name

    def __iter__(self) -> Iterator[int]:
        return iter(self._roster.seats)

    def __len__(self) -> int:
        return len(self._roster.seats)
