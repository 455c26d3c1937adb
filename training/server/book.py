"""What is to be done next in one generation of a job: passes, steps, averages, and who is too late for them. Pure.

A *cohort* is what goes through one pass together: the micro-batches of one number of all contributors where they share
a weight set, else whatever is ready, one of each client; with nothing else to do it waits a little for those who went
along last time. It goes back together too. A *share* is all of one client in one step; with its commit it is complete.
Whoever is late costs the others a deadline at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.job_config import JobConfig
from training.server.company import Company
from training.server.ledger import Ledger, Track
from training.server.records import Cohort, Micro, Phase, Share
from training.strategy import Strategy, averages

# With own sets nobody has to wait for others: a cohort's slower half goes back by itself after so many times what the
# fastest took to answer, or so many seconds.
PATIENCE = 4.0
LEAST_PATIENCE = 0.5

Room = Callable[[Sequence[Micro]], int]


@dataclass(frozen=True, slots=True, eq=False)
class RunForward:
    """Take a cohort through the blocks."""

    cohort: Cohort


@dataclass(frozen=True, slots=True, eq=False)
class GoBack:
    """Take a cohort's gradients back; members that did not return theirs go back with zeros."""

    cohort: Cohort


@dataclass(frozen=True, slots=True, eq=False)
class CloseStep:
    """Step a weight set: `shares` are complete, in the order of the clients' numbers, `left` came too late."""

    track: Track
    step: int
    shares: tuple[Share, ...]
    left: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Meet:
    """Make `step` in the set of each of `shares`, then average them; `left` gives the steps that others missed.

    Only when all are there, or too late, is the step made: until then everybody could go on without who is missing.
    """

    step: int
    shares: tuple[Share, ...]
    left: Mapping[int, tuple[int, ...]]


Work = RunForward | GoBack | CloseStep | Meet


class Book:
    """Ask it for what is `next`, and say when that is done.

    `wakes_at` is when the answer may change by itself.
    """

    def __init__(self, config: JobConfig, strategy: Strategy, ledger: Ledger) -> None:
        self._config = config
        self._strategy = strategy
        self._ledger = ledger
        self._cohorts: list[Cohort] = []
        self._company = Company()
        # After how many messages there was nothing to be done.
        self._idle_after: int | None = None
        self.wakes_at: float | None = None

    @property
    def cohorts(self) -> Sequence[Cohort]:
        """Those that went forward and not back yet."""
        return self._cohorts

    def next(self, now: float, room: Room) -> Work | None:
        """Say what is to be done now. `room` says how many of some micro-batches may go forward together."""
        quiet = self._idle_after == self._ledger.messages and (self.wakes_at is None or now < self.wakes_at)
        # Where nothing came and it is too early for anything, memory may be free again.
        work = self._next_forward(now, room) if quiet else self._next_of_all(now, room)
        self._idle_after = self._ledger.messages if work is None else None
        return work

    def _next_of_all(self, now: float, room: Room) -> Work | None:
        self.wakes_at = None
        for track in self._ledger.tracks:
            self._open(track, now)
        return self._next_back(now) or self._next_close(now) or self._next_meeting(now) or self._next_forward(now, room)

    def _expired(self, since: float, now: float, seconds: float | None) -> bool:
        """Say whether so many seconds have passed; otherwise note when they will have."""
        if seconds is None:
            return False
        if now >= since + seconds:
            return True
        self.wakes_at = min(since + seconds, self.wakes_at if self.wakes_at is not None else since + seconds)
        return False

    def _open(self, track: Track, now: float) -> None:
        """Say of which numbers the micro-batches of the step under way may go forward: nobody is missed any more."""
        active = [share for share in self._ledger.contributors_of(track) if share.is_open]
        for number, first in self._arrived(active, track):
            # Clients send in order: who has sent a later one has none of this number.
            missing = [share for share in active if share.is_open and share.newest < number]
            if missing:
                if not self._expired(max(first, track.since), now, self._config.deadline_seconds):
                    return
                self._ledger.leave_out(missing)
            track.opened.add(number)

    def _arrived(self, shares: Sequence[Share], track: Track) -> list[tuple[int, float]]:
        """Give the numbers of which something waits that are not opened yet, and when the first of each came."""
        arrived: dict[int, float] = {}
        for share in shares:
            for micro in self._ledger.waiting(share):
                if micro.number not in track.opened:
                    arrived[micro.number] = min(micro.arrived_at, arrived.get(micro.number, micro.arrived_at))
        return sorted(arrived.items())

    def _next_forward(self, now: float, room: Room) -> RunForward | None:
        for ready in self._ready():
            count = room(ready)
            if count == len(ready) and self._awaits_company(ready, now):
                continue
            if count:
                taken = ready[:count]
                for micro in taken:
                    micro.phase = Phase.RUNNING
                self._company.leave(((micro.client, micro.arrived_at) for micro in taken), now)
                return RunForward(Cohort(tuple(taken)))
        return None

    def _ready(self) -> Iterator[list[Micro]]:
        """Give what may go forward, each time what goes together."""
        if self._strategy.own_sets:
            choices = [self._ready_alone()]
        else:
            choices = [self._ready_together(track) for track in self._ledger.tracks]
        yield from filter(None, choices)

    def _awaits_company(self, ready: Sequence[Micro], now: float) -> bool:
        """Say whether those with own sets wait for others who are about to send their states."""
        if not self._strategy.own_sets:
            return False
        there = {micro.client for micro in ready}
        clients = {client for track in self._ledger.tracks for client in track.clients}
        missing = [client for client in sorted(clients - there) if self._ledger.may_send(client)]
        until = self._company.wait_until(min(micro.arrived_at for micro in ready), missing)
        return until is not None and not self._expired(until, now, 0.0)

    def _ready_together(self, track: Track) -> list[Micro]:
        shares = [share for share in self._ledger.contributors_of(track) if share.is_open]
        waiting = [micro for share in shares for micro in self._ledger.waiting(share) if micro.number in track.opened]
        first = min((micro.number for micro in waiting), default=None)
        return [micro for micro in waiting if micro.number == first]

    def _ready_alone(self) -> list[Micro]:
        ready = []
        for track in self._ledger.tracks:
            for share in self._ledger.contributors_of(track) if track.met_at is None else []:
                ready += sorted(self._ledger.waiting(share), key=lambda micro: micro.number)[:1]
        return ready

    def ran(self, cohort: Cohort, now: float) -> None:
        """Note that a cohort went forward. Members that failed were settled by the caller."""
        cohort.answered_at = now
        self._company.arrive(
            (micro.client for micro in cohort.members), sum(micro.count for micro in cohort.members), now
        )
        for micro in cohort.members:
            if micro.phase is Phase.RUNNING:
                micro.phase = Phase.ANSWERED
        self._cohorts.append(cohort)

    def went_back(self, cohort: Cohort, now: float) -> None:
        """Note that a cohort's gradients were taken back."""
        self._company.answer((micro.client for micro in cohort.members), now)

    def _next_back(self, now: float) -> GoBack | None:
        for cohort in list(self._cohorts):
            late = [micro for micro in cohort.members if self._holds_up(micro)]
            returned = [micro for micro in cohort.members if micro.phase is Phase.RETURNED and micro not in late]
            if late and (not returned or not self._is_late(cohort, late, returned, now)):
                continue
            self._cohorts.remove(cohort)
            return GoBack(cohort)
        return None

    def _holds_up(self, micro: Micro) -> bool:
        """Say whether a cohort waits for this member: its gradient, or that earlier ones of its step go first."""
        if micro.phase is not Phase.RETURNED:
            return micro.phase is Phase.ANSWERED
        share = self._ledger.share(micro.client, micro.step)
        return any(other.number < micro.number for other in self._ledger.unsettled(share))

    def _is_late(self, cohort: Cohort, late: list[Micro], returned: list[Micro], now: float) -> bool:
        """Say whether a cohort goes back without some: left out of a joint step, or to go back by themselves."""
        first = min(micro.returned_at for micro in returned)
        if not self._strategy.own_sets:
            slow = [micro for micro in late if micro.phase is Phase.ANSWERED]
            if not slow or not self._expired(first, now, self._config.deadline_seconds):
                return False
            self._ledger.leave_out(self._ledger.share(micro.client, micro.step) for micro in slow)
            return len(slow) == len(late)
        patience = max(LEAST_PATIENCE, PATIENCE * (first - cohort.answered_at))
        if self._config.deadline_seconds is not None:
            # Who waits for a slow one must not be late itself.
            patience = min(patience, self._config.deadline_seconds / 4)
        if not self._expired(first, now, patience):
            return False
        for micro in late:
            self._cohorts.append(Cohort((micro,), answered_at=cohort.answered_at))
        cohort.members = tuple(micro for micro in cohort.members if micro not in late)
        return True

    def _next_close(self, now: float) -> CloseStep | None:
        for track in self._ledger.tracks:
            if track.met_at is not None:
                continue
            shares = self._ledger.contributors_of(track)
            complete = [share for share in shares if share.commit is not None and not share.out]
            missing = [share for share in shares if share.is_open]
            if not shares or (not complete and missing) or not all(map(self._ledger.is_settled, complete)):
                continue
            if averages(self._config, self._strategy, track.step):
                track.met_at = complete[0].committed_at if complete else now
                continue
            if missing:
                first = min(share.committed_at for share in complete)
                if not self._expired(first, now, self._config.deadline_seconds):
                    continue
                self._ledger.leave_out(missing)
            left = tuple(share.client for share in shares if share.out)
            return CloseStep(track, track.step, tuple(complete), left)
        return None

    def close(self, work: CloseStep, now: float) -> None:
        """Note that a set made its step."""
        self._ledger.go_on(work.track, work.step, now)

    def _next_meeting(self, now: float) -> Meet | None:
        met = [track for track in self._ledger.tracks if track.met_at is not None]
        missing = [track for track in self._ledger.tracks if track.met_at is None]
        if not met:
            return None
        first = min(track.met_at for track in met if track.met_at is not None)
        if missing and not self._expired(first, now, self._config.deadline_seconds):
            return None
        step = met[0].step
        left = {track.clients[0]: tuple(range(track.step, step + 1)) for track in missing}
        for track in missing:
            self._ledger.leave_out_until(track, step)
        shares = [self._ledger.share(track.clients[0], step) for track in met]
        left |= {share.client: (step,) for share in shares if share.out}
        return Meet(step, tuple(share for share in shares if not share.out), left)

    def forget(self, client: int) -> None:
        """Take a client, all of whose micro-batches are settled, out of the cohorts that wait for others.

        Its weights are about to change, and so the tapes that read them can go back no more.
        """
        for cohort in self._cohorts:
            if any(micro.client == client for micro in cohort.members):
                cohort.members = tuple(micro for micro in cohort.members if micro.client != client)
                cohort.drop_tape()

    def met(self, work: Meet, now: float) -> None:
        """Note that all sets go on from their average."""
        for track in self._ledger.tracks:
            self._ledger.go_on(track, work.step, now)
