"""Which queued steps ride in the next pass. Pure: integers in, integers out.

A session whose queued rows are few is *small*: a decode, a draft, the end of a prompt. All others prefill. One pass
takes, in this order:

1. the one step that has waited longest, whoever sent it: with it every step is picked after at most as many passes as
   older steps were waiting, so nothing starves;
2. small sessions, up to the budget less the share that is kept for prefill while any prefill waits;
3. prefill, one step at a time;
4. small sessions again, where prefill left room.

In 2-4 the next step always comes from the owner with the fewest rows in this pass, and from that owner's session with
the fewest rows; ties go to whoever was served longest ago. A session's steps keep their order. When everything that
waits fits into one pass, all of this comes to the same, and it is taken as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

SMALL_ROWS = 64
PREFILL_SHARE = 4


# Candidates and picks are not frozen, though nobody changes one: they are made for every session in every pass.
@dataclass(slots=True)
class Candidate(Generic[K]):
    """One session with queued work.

    `steps` holds the rows of its first queued steps, of which any leading part may ride in one pass together.
    `waiting_since` orders sessions by the arrival of their first step; any increasing number will do.
    """

    key: K
    owner: str
    steps: tuple[int, ...]
    waiting_since: float

    @property
    def rows(self) -> int:
        """All that is queued."""
        return sum(self.steps)

    @property
    def is_small(self) -> bool:
        """Say whether all that is queued fits beside many others."""
        return self.rows <= SMALL_ROWS


@dataclass(slots=True)
class Pick(Generic[K]):
    """Take the first `steps` queued steps of session `key`, `rows` rows together."""

    key: K
    steps: int
    rows: int


def max_step_rows(max_rows: int) -> int:
    """Give the most rows one step may have, so that the prefill share of a pass of `max_rows` always holds it."""
    return max(1, max_rows // PREFILL_SHARE)


class PassBudget:
    """What is left of one pass: rows and sequences. Lives for one pass."""

    def __init__(self, rows: int, sequences: int) -> None:
        self.rows = rows
        self.sequences = sequences

    def take(self, rows: int, *, joins: bool, keep_rows: int = 0, keep_sequences: int = 0) -> bool:
        """Take `rows` for one step, and a sequence if its session `joins` the pass; say no if the rest would not do."""
        sequences = 1 if joins else 0
        if self.rows - rows < keep_rows or self.sequences - sequences < (keep_sequences if joins else 0):
            return False
        self.rows -= rows
        self.sequences -= sequences
        return True


class _Turns:
    """One session's or one owner's place in the pass."""

    __slots__ = ("last", "rows")

    def __init__(self, last: int) -> None:
        self.rows = 0
        self.last = last


class Scheduler:
    """Picks the steps of each pass; remembers only when sessions and owners were last served."""

    def __init__(self, max_rows: int, max_sequences: int) -> None:
        assert max_rows >= 1
        assert max_sequences >= 1
        self.max_rows = max_rows
        self.max_sequences = max_sequences
        self._turn = 0
        self._served: dict[Hashable, int] = {}
        self._owner_served: dict[str, int] = {}

    def pick(self, candidates: Sequence[Candidate[K]]) -> list[Pick[K]]:
        """Choose the next pass. Every step must have at most `max_step_rows(max_rows)` rows."""
        candidates = [candidate for candidate in candidates if candidate.steps]
        if not candidates:
            return []
        picks = [Pick(candidate.key, len(candidate.steps), candidate.rows) for candidate in candidates]
        if len(picks) <= self.max_sequences and sum(pick.rows for pick in picks) <= self.max_rows:
            self._note_all(candidates)
            return picks
        one_pass: _Pass[K] = _Pass(self, candidates)
        small = [candidate for candidate in candidates if candidate.is_small]
        prefill = [candidate for candidate in candidates if not candidate.is_small]
        share = max_step_rows(self.max_rows)
        oldest = min(candidates, key=lambda candidate: candidate.waiting_since)
        one_pass.take(oldest)
        taken = 0 if oldest.is_small else oldest.steps[0]
        waiting = any(one_pass.has_more(candidate) for candidate in prefill)
        one_pass.fill(
            small, keep_rows=max(0, share - taken) if waiting else 0, keep_sequences=int(waiting and not taken)
        )
        one_pass.fill(prefill)
        one_pass.fill(small)
        return one_pass.picks()

    def forget(self, key: Hashable) -> None:
        """Drop what is remembered about a session that ended."""
        self._served.pop(key, None)

    def forget_owner(self, owner: str) -> None:
        """Drop what is remembered about an owner without sessions."""
        self._owner_served.pop(owner, None)

    def last_served(self, candidate: Candidate[K]) -> tuple[int, int]:
        """Give the turns at which the candidate's owner and the candidate were last served; 0 is never."""
        return self._owner_served.get(candidate.owner, 0), self._served.get(candidate.key, 0)

    def _note_all(self, candidates: Iterable[Candidate[K]]) -> None:
        self._turn += 1
        for candidate in candidates:
            self._served[candidate.key] = self._owner_served[candidate.owner] = self._turn

    def note(self, candidate: Candidate[K]) -> None:
        """Remember that the candidate had a turn now."""
        self._turn += 1
        self._served[candidate.key] = self._turn
        self._owner_served[candidate.owner] = self._turn


class _Pass(Generic[K]):
    """One pass in the making."""

    def __init__(self, scheduler: Scheduler, candidates: Iterable[Candidate[K]]) -> None:
        self._scheduler = scheduler
        self._budget = PassBudget(scheduler.max_rows, scheduler.max_sequences)
        self._taken: dict[K, int] = {}
        self._sessions: dict[K, _Turns] = {}
        self._owners: dict[str, _Turns] = {}
        self._candidates = {candidate.key: candidate for candidate in candidates}
        for candidate in self._candidates.values():
            owner_last, last = scheduler.last_served(candidate)
            self._sessions[candidate.key] = _Turns(last)
            self._owners.setdefault(candidate.owner, _Turns(owner_last))

    def has_more(self, candidate: Candidate[K]) -> bool:
        """Say whether steps of the candidate are left."""
        return self._taken.get(candidate.key, 0) < len(candidate.steps)

    def take(self, candidate: Candidate[K], keep_rows: int = 0, keep_sequences: int = 0) -> bool:
        """Take the candidate's next step if it fits."""
        count = self._taken.get(candidate.key, 0)
        rows = candidate.steps[count]
        if not self._budget.take(rows, joins=count == 0, keep_rows=keep_rows, keep_sequences=keep_sequences):
            return False
        self._taken[candidate.key] = count + 1
        self._sessions[candidate.key].rows += rows
        self._owners[candidate.owner].rows += rows
        self._scheduler.note(candidate)
        return True

    def fill(self, candidates: Iterable[Candidate[K]], keep_rows: int = 0, keep_sequences: int = 0) -> None:
        """Give turns to the candidates until none of their next steps fits."""
        order = {candidate.key: place for place, candidate in enumerate(candidates)}
        queues: dict[str, list[tuple[int, int, int, Candidate[K]]]] = {}
        for key, place in order.items():
            candidate = self._candidates[key]
            if self.has_more(candidate):
                turns = self._sessions[key]
                queues.setdefault(candidate.owner, []).append((turns.rows, turns.last, place, candidate))
        for queue in queues.values():
            heapq.heapify(queue)
        owners = [(self._owners[owner].rows, self._owners[owner].last, owner) for owner in queues]
        heapq.heapify(owners)
        while owners:
            _, last, owner = heapq.heappop(owners)
            queue = queues[owner]
            _, session_last, place, candidate = heapq.heappop(queue)
            # A step that does not fit leaves this fill; the next pass may begin with it.
            if self.take(candidate, keep_rows, keep_sequences) and self.has_more(candidate):
                heapq.heappush(queue, (self._sessions[candidate.key].rows, session_last, place, candidate))
            if queue:
                heapq.heappush(owners, (self._owners[owner].rows, last, owner))

    def picks(self) -> list[Pick[K]]:
        """List what was taken, in the order in which sessions joined."""
        return [Pick(key, steps, self._sessions[key].rows) for key, steps in self._taken.items()]
