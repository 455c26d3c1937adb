"""One answer, watched: where each round's time went."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_client.generate import EdgeSession
from edge_client.planning.cost import Parts
from edge_client.turn import Turn
from edge_client.work import PhaseTimes

Times = Callable[[], PhaseTimes]
# A round that took so many times as long as usual counts as one that took just so long: a machine that froze once tells
# nothing about the next answer.
MOST_DISTURBED = 5.0
# Rounds that are left out of medians: caches and the link's window are not yet as they will be.
SETTLING = 3


@dataclass(frozen=True, slots=True)
class Round:
    """One round trip: `away` from handing the rows to the link until the answer was there, `here` all after that, and
    what of `here` the edge's model took by phase."""

    tokens: int
    away: float
    here: float
    phases: PhaseTimes
    drafted: int
    accepted: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.away + self.here

    @property
    def overhead(self) -> float:
        """What of `here` no phase accounts for."""
        return max(0.0, self.here - float(sum(dataclasses.astuple(self.phases))))


@dataclass(frozen=True, slots=True)
class Watched:
    """An answer's rounds; the first token, and the bytes that went for it, are apart. Seconds and bytes."""

    prompt_tokens: int
    first_token: float
    rounds: tuple[Round, ...]
    bytes_up: int
    bytes_down: int

    @property
    def rows_up(self) -> int:
        """Rows sent behind the prompt: each round's token, and its guesses."""
        return sum(1 + one.drafted for one in self.rounds)

    @property
    def tokens(self) -> int:
        """Tokens behind the first."""
        return sum(one.tokens for one in self.rounds)

    @property
    def seconds(self) -> float:
        """Time for them by the clock."""
        return sum(one.seconds for one in self.rounds)

    def median(self, pick: Callable[[Round], float]) -> float:
        """Give the median over the rounds, once they have settled."""
        return statistics.median(map(pick, self._settled))

    @property
    def disturbance(self) -> float:
        """Seconds that a round takes on average beyond the median one: others want the machine or the link too."""
        usual = self.median(lambda one: one.seconds)
        mean = statistics.fmean(min(one.seconds, MOST_DISTURBED * usual) for one in self._settled)
        return max(0.0, mean - usual)

    @property
    def _settled(self) -> Sequence[Round]:
        return self.rounds[SETTLING:] or self.rounds


async def watch(session: EdgeSession, ids: Sequence[int], turn: Turn, times: Times) -> Watched:
    """Generate one answer. `times` are those of the edge's model, which must have nothing else to do."""
    stats, rounds = session.stats, []
    before, answered, begin = _copy(times), session.remote.answered_at, time.perf_counter()
    tokens = drafted = accepted = 0
    first = at = begin
    spent = (0, 0)
    async for _ in session.generate(ids, turn):
        if session.remote.answered_at == answered:
            continue  # one more token of the same round
        now, after, came = time.perf_counter(), _copy(times), session.remote.answered_at
        if tokens:
            guesses = (stats.drafted - drafted, stats.accepted - accepted)
            phases = _less(after, before)
            rounds.append(Round(len(turn.tokens) - tokens, came - at, now - came, phases, *guesses))
        else:
            first = now
            spent = (stats.bytes_up, stats.bytes_down)
        tokens, drafted, accepted = len(turn.tokens), stats.drafted, stats.accepted
        before, answered, at = after, came, now
    bytes_up, bytes_down = stats.bytes_up - spent[0], stats.bytes_down - spent[1]
    return Watched(stats.prompt_tokens, first - begin, tuple(rounds), bytes_up, bytes_down)


def mean_parts(answers: Sequence[Watched], *, wire: float, way: float, server: float | None) -> Parts:
    """Seconds per token over all rounds of some answers; they add up to the time by the clock.

    `wire` is for the bytes of all rounds, `way` an empty round trip, `server` the server's own time per round where it
    tells. Then the wait is the rest of the time away; else the way is believed, and the rest is the server's.
    """
    rounds = [one for answer in answers for one in answer.rounds]
    away = sum(one.away for one in rounds)
    on_the_wire = min(wire, away)
    left = away - on_the_wire
    at_the_server = left - min(way * len(rounds), left) if server is None else min(server * len(rounds), left)
    phases = {field.name: sum(getattr(one.phases, field.name) for one in rounds) for field in _FIELDS}
    return Parts(
        a=phases["a"],
        c=phases["c"],
        head=phases["head"],
        sampling=phases["choose"],
        drafting=phases["draft"],
        codec=phases["codec"],
        wire=on_the_wire,
        wait=left - at_the_server,
        server=at_the_server,
        overhead=sum(one.here for one in rounds) - sum(phases.values()),
    ).per(max(1, sum(one.tokens for one in rounds)))


_FIELDS = dataclasses.fields(PhaseTimes)


def _copy(times: Times) -> PhaseTimes:
    return dataclasses.replace(times())


def _less(after: PhaseTimes, before: PhaseTimes) -> PhaseTimes:
    return PhaseTimes(**{field.name: getattr(after, field.name) - getattr(before, field.name) for field in _FIELDS})
