"""Who takes part in a job, who is missed, and when and where everybody (re)starts. Pure: times come from the caller.

Everybody goes on from one common state. Who only lost the connection still has it; who was killed has its checkpoints,
and all go back to the newest step that each of them can restore. Step 0, from which all began, anybody can, but they go
there only before the first checkpoint was due. Later a client without a state in common with the others (a disk that
was full or is gone) is treated as one that was given up: such a client did not take part in what came since, so it is
asked for no state of that time, keeps its own, and nobody loses anything for it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from split_llama.errors import JobEnded, NotOwner

KEPT_CHECKPOINTS = 2


@dataclass(slots=True)
class Seat:
    """One client's place in a job.

    `secret` is a hash. `since` is the step from which on it took part without a gap, null once it was given up. `have`
    are the steps it can restore beside 0, `passing` the one of them that is on no disk, `worked` the last one it had a
    share in.
    """

    index: int
    name: str
    secret: str
    samples: int = 0
    since: int | None = 0
    have: frozenset[int] = frozenset()
    passing: int | None = None
    worked: int = 0
    present: bool = False
    fresh: bool = False
    lost_at: float | None = None

    def can_restore(self, step: int) -> bool:
        """Say whether it has the state after `step`."""
        return step == 0 or step in self.have

    def keeps_up(self, step: int) -> bool:
        """Say whether its newest state is that after `step` too: it had no share in what came in between."""
        return self.worked <= max(self.have, default=0) <= step

    def needs(self, step: int) -> bool:
        """Say whether it took part in what led to `step`, so that it must have the state."""
        return self.since is not None and self.since <= step


@dataclass(frozen=True, slots=True)
class Restart:
    """Everybody present goes on after `steps[index]`; those in `restored` from the state of that step.

    With `checkpoint` the server restores that step too, without it what it holds is right already.
    """

    steps: Mapping[int, int]
    restored: frozenset[int]
    checkpoint: int | None


@dataclass(slots=True)
class Roster:
    """The seats of one job. `is_kept` says of a step whether everybody keeps a checkpoint of it."""

    size: int
    rejoin_seconds: float
    is_kept: Callable[[int], bool]
    seats: dict[int, Seat] = field(default_factory=dict)
    begun: bool = False
    started: frozenset[int] = frozenset()
    # A step was closed after which everybody was to keep a checkpoint.
    was_kept: bool = False

    @property
    def present(self) -> frozenset[int]:
        """The numbers of those who are connected."""
        return frozenset(seat.index for seat in self.seats.values() if seat.present)

    def join(self, name: str, secret: str, samples: int, have: Iterable[int], now: float) -> Seat:
        """Give a newcomer a seat, or one who returns its own. Raises `NotOwner`, and `JobEnded` when all are taken."""
        seat = next((seat for seat in self.seats.values() if seat.name == name), None)
        if seat is None:
            seat = self._take_free(name, secret)
        elif not hmac.compare_digest(seat.secret, secret):
            raise NotOwner(f"the client {name!r} of this job has another secret; choose another name, or its folder")
        if not self.present:
            # Nobody was there to wait for the others: their time begins now.
            for other in self.seats.values():
                other.lost_at = now
        seat.samples, seat.have = samples, frozenset(have)
        seat.present, seat.fresh, seat.lost_at = True, True, None
        return seat

    def _take_free(self, name: str, secret: str) -> Seat:
        index = next(index for index in range(len(self.seats) + 1) if index not in self.seats)
        if index >= self.size:
            names = ", ".join(repr(seat.name) for seat in self.seats.values())
            raise JobEnded(f"all {self.size} places of the job are taken, by {names}; {name!r} is none of them")
        return self.seats.setdefault(index, Seat(index, name, secret))

    def lose(self, index: int, now: float) -> None:
        """Note that a client's connection is gone. Before the job began nothing is lost, and its seat is free."""
        seat = self.seats[index]
        seat.present, seat.lost_at = False, now
        if not self.begun:
            del self.seats[index]

    def leave(self, index: int) -> None:
        """Note that a client went for good."""
        seat = self.seats[index]
        seat.present, seat.since = False, None
        if not self.begun:
            del self.seats[index]

    def missed(self, index: int) -> None:
        """Note that a step was closed without a client. If it is away, the others do not go back for it any more."""
        if not self.seats[index].present:
            self.seats[index].since = None

    def closed(self, index: int, step: int) -> None:
        """Note that a client was told that a step is closed: it has the state after it."""
        seat = self.seats[index]
        seat.have, seat.passing = self._newest(seat.have - {seat.passing or 0}, step), None
        self.was_kept = self.was_kept or self.is_kept(step)

    def had_share(self, index: int, step: int) -> None:
        """Note that a client had a share in a step that was closed, told or not."""
        self.seats[index].worked = step

    def _newest(self, have: frozenset[int], live: int) -> frozenset[int]:
        kept = sorted(step for step in {*have, live} if step <= live and self.is_kept(step))
        return frozenset((*kept[-KEPT_CHECKPOINTS:], live))

    @property
    def is_waiting(self) -> bool:
        """Say whether somebody is away who is expected back."""
        return self.begun and bool(self._awaited())

    def wakes_at(self) -> float | None:
        """Say when `decide` may come to another answer by itself."""
        if not self.begun or not self.is_due:
            return None
        return min((self._given_up_at(seat) for seat in self._awaited()), default=None)

    def decide(self, live: Mapping[int, int], kept: Iterable[int], average: int, now: float) -> Restart | None:
        """Say where everybody goes on, if it is time for that; what follows is up to the caller.

        `live` gives the step that the server holds for each seat (empty when it holds none), `kept` its checkpoints,
        and `average` the newest step after which all sets of weights met: who had left goes on from there.
        """
        if not self.is_due or (not self.begun and len(self.present) < self.size):
            return None
        if any(now < self._given_up_at(seat) for seat in self._awaited()):
            return None
        for seat in self._awaited():
            seat.since = None
        if not self.begun:
            self._number_by_name()
        self.begun = True
        return self._restart(live, kept, average)

    @property
    def is_due(self) -> bool:
        """Say whether who is there differs from who was there at the last start."""
        present = self.present
        return bool(present) and (present != self.started or any(self.seats[index].fresh for index in present))

    def _awaited(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if not seat.present and seat.since is not None]

    def _given_up_at(self, seat: Seat) -> float:
        return (seat.lost_at or 0.0) + self.rejoin_seconds

    def _number_by_name(self) -> None:
        """Have the numbers follow from the names: who connected first must not decide the result."""
        seats = sorted(self.seats.values(), key=lambda seat: seat.name)
        self.seats.clear()
        for index, seat in enumerate(seats):
            seat.index = index
            self.seats[index] = seat

    def _restart(self, live: Mapping[int, int], kept: Iterable[int], average: int) -> Restart:
        present = [self.seats[index] for index in sorted(self.present)]
        for seat in self._without_common([seat for seat in present if seat.since is not None], live, kept):
            seat.since = None
        members = [seat for seat in present if seat.since is not None]
        if live and not _lacking_live(members, live):
            steps = {seat.index: live[seat.index] if seat in members else average for seat in present}
            restored = frozenset(seat.index for seat in members if seat.can_restore(steps[seat.index]))
            restart = Restart(steps, restored, None)
        else:
            common = (
                step for step in {0, *kept} if all(seat.can_restore(step) for seat in members if seat.needs(step))
            )
            step = max(common)
            restored = frozenset(seat.index for seat in members if seat.needs(step))
            restart = Restart({seat.index: step for seat in present}, restored, step)
        for seat in present:
            self._seat_again(seat, restart)
        self.started = frozenset(restart.steps)
        return restart

    def _without_common(self, members: list[Seat], live: Mapping[int, int], kept: Iterable[int]) -> list[Seat]:
        """Give those for whom all the others would have to begin again: as few as can be, best what is live stays."""
        steps = sorted({*kept} - {0}, reverse=True)
        choices = [_lacking_live(members, live)] if live else []
        choices += [[seat for seat in members if seat.needs(step) and not seat.can_restore(step)] for step in steps]
        fewest: list[Seat] = min(choices, key=len, default=[])
        reached = max(live.values(), default=0)
        told = (step for seat in members for step in seat.have if 0 < step <= reached)
        return fewest if steps or self.was_kept or any(map(self.is_kept, told)) else []

    def _seat_again(self, seat: Seat, restart: Restart) -> None:
        step = restart.steps[seat.index]
        is_member = seat.needs(step) and (restart.checkpoint is None or seat.index in restart.restored)
        if not is_member:
            seat.since, seat.have = step, frozenset()
        from_disk = restart.checkpoint is not None and seat.index in restart.restored
        if not from_disk and (seat.fresh or seat.index not in restart.restored):
            seat.passing = step
        seat.have = self._newest(seat.have, step)
        seat.worked = min(seat.worked, step)
        seat.fresh = False


def _lacking_live(members: Iterable[Seat], live: Mapping[int, int]) -> list[Seat]:
    return [seat for seat in members if seat.index not in live or not _can_go_on(seat, live[seat.index])]


def _can_go_on(seat: Seat, step: int) -> bool:
    return seat.can_restore(step) or seat.keeps_up(step)
