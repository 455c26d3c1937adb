"""Room in the KV pages: which steps get some, which wait for it, and which sessions give theirs up.

A step takes pages that are free and not promised to others. Where those do not do, sessions idle for `evict_after`
seconds give theirs up, the one idle longest first: to host memory if it has room, else they are lost and the client
sends its states again (RESYNC). Where that does not do either, the step waits in its queue while others pass it by.
After `PREEMPT_SECONDS` the step that has waited longest may take the pages of those that came later and wait like it;
after `PATIENCE_SECONDS` a step is refused with `OutOfPages`, and may be sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from serving.metrics import DROPPED, SWAPPED, Metrics
from serving.promises import Promises
from serving.reclaim import idle_since, swapped_first
from serving.registry import Entry
from serving.session import Phase, Session
from serving.steps import Step
from split_llama.engine.pages import CacheEdit, PagePool, SwapOut
from split_llama.engine.plan import SequenceRun
from split_llama.errors import OutOfPages

# Positions for which a generating session is promised room.
PROMISED_POSITIONS = 64
# A promise ends when its session has not been heard of for so long.
PROMISE_SECONDS = 5.0
PREEMPT_SECONDS = 1.0
PATIENCE_SECONDS = 10.0


class Room:
    """Gives pages to the sessions in `entries`; belongs to the event loop."""

    def __init__(
        self,
        pool: PagePool,
        entries: Iterable[Entry],
        metrics: Metrics,
        clock: Callable[[], float],
        evict_after: float,
    ) -> None:
        self._pool = pool
        self._entries = entries
        self._metrics = metrics
        self._clock = clock
        self._evict_after = evict_after
        self._promises: Promises[Entry] = Promises()
        self._waiting: dict[Entry, tuple[int, float]] = {}

    @property
    def num_waiting(self) -> int:
        """Sessions whose next step waits for pages."""
        return len(self._waiting)

    def promised_to(self, entry: Entry) -> int:
        """Give how many of the free pages an entry has been promised."""
        return self._promises.of(entry)

    def check_integrity(self) -> None:
        """Assert that every promise can be kept."""
        self._promises.check_integrity(self._pool.num_free)

    # Who may go

    def ready(self, entries: Sequence[Entry]) -> list[Entry]:
        """Leave out the entries whose first queued step has to wait for pages; each of the others finds room alone.

        A step that will not find room, or has waited too long, is left in: `plan` raises, and `may_wait` says no.
        """
        ready = [entry for entry in entries if self._fits(entry, 0)]
        if len(ready) < len(entries):
            self._end_promises()
            within_reach = self._pool.count_freed(_tables(self._idle()))
            ready = [entry for entry in entries if self._fits(entry, within_reach)]
        going = set(ready)
        self._note_waiting(entry for entry in entries if entry not in going)
        self._help_oldest()
        # Some of those that wait may just have been lost to the oldest.
        return ready + [entry for entry in self._waiting if not self.may_wait(entry, entry.session.queued[0])]

    def _fits(self, entry: Entry, within_reach: int) -> bool:
        needed = entry.session.pages_needed(entry.session.queued[0])
        return needed <= 0 or needed <= self._promises.free_for(entry, self._pool.num_free) + within_reach

    def _note_waiting(self, stuck: Iterable[Entry]) -> None:
        before, self._waiting = self._waiting, {}
        for entry in sorted(stuck, key=lambda entry: entry.session.queued[0].arrived):
            seq = entry.session.queued[0].seq
            known = before.get(entry, (0, 0.0))
            self._waiting[entry] = known if known[0] == seq else (seq, self._clock())

    def may_wait(self, entry: Entry, step: Step) -> bool:
        """Say whether a step that found no room may wait for it, or is to be refused."""
        if -(-step.end // self._pool.page_size) > self._pool.num_pages:
            return False
        seq, since = self._waiting.get(entry, (0, 0.0))
        return seq != step.seq or self._clock() - since < PATIENCE_SECONDS

    def _help_oldest(self) -> None:
        """Let the step that has waited longest take pages of those that came later and wait, where that is enough."""
        oldest = next(iter(self._waiting), None)
        if oldest is None or self._clock() - self._waiting[oldest][1] < min(PREEMPT_SECONDS, self._evict_after):
            return
        idle, later = self._idle(), [entry for entry in list(self._waiting)[1:] if entry.session.sequence.block_table]
        within_reach = self._pool.count_freed(_tables(idle))
        if self._fits(oldest, self._pool.count_freed(_tables([*idle, *later]))):
            while later and not self._fits(oldest, within_reach):
                self._evict(later.pop(), keep=oldest)
        # What is free now is not for those that would pass it by.
        needed = oldest.session.pages_needed(oldest.session.queued[0])
        self._promises.renew(oldest, needed, self._pool.num_free)

    # Giving pages

    def plan(self, entry: Entry, step: Step) -> SequenceRun:
        """Plan a running step, making room for it if that can be done. Raises what `Session.plan` does."""
        needed = entry.session.pages_needed(step)
        if needed == 0:
            # Most steps: they end in the page that the last one began, and what was promised still is.
            return entry.session.plan(step)
        self._make_room(entry, needed)
        with self._taking(entry):
            return entry.session.plan(step)

    def fork(self, parent: Entry, at: int) -> Session:
        """Fork a session, making room for its way back from host memory first. Raises what `Session.fork` does."""
        sequence = parent.session.sequence
        self._make_room(parent, 0 if sequence.ticket is None else sequence.num_pages)
        with self._taking(parent):
            return parent.session.fork(at)

    def forget(self, entry: Entry) -> None:
        """Drop what is remembered about a session that ended or was lost."""
        self._promises.forget(entry)
        self._waiting.pop(entry, None)

    def _make_room(self, entry: Entry, needed: int) -> None:
        idle = iter(self._idle() if needed > self._promises.free_for(entry, self._pool.num_free) else ())
        while (free := self._promises.free_for(entry, self._pool.num_free)) < needed:
            victim = next(idle, None)
            if victim is None:
                raise OutOfPages(
                    f"{needed} more KV pages of {self._pool.page_size} positions are needed, {max(0, free)} are free "
                    "and not promised to others; send the same step again later",
                    retry_after_ms=500,
                )
            self._evict(victim, keep=entry)

    @contextmanager
    def _taking(self, entry: Entry) -> Iterator[None]:
        """Promise an entry that takes pages room for its next positions, and count who came back."""
        sequence = entry.session.sequence
        was_away = sequence.ticket is not None
        yield
        self._metrics.swap_ins.inc(was_away)
        end = min(sequence.length + PROMISED_POSITIONS, max(sequence.length, sequence.max_length))
        self._promises.renew(entry, sequence.pages_needed(sequence.length, end), self._pool.num_free)

    # Taking pages back

    def _idle(self) -> list[Entry]:
        return idle_since(self._entries, self._clock() - self._evict_after)

    def _end_promises(self) -> None:
        horizon = self._clock() - PROMISE_SECONDS
        for entry in list(self._promises):
            session = entry.session
            is_busy = session.queued or session.running or entry.active_at > horizon
            if session.phase is not Phase.ACTIVE or not is_busy:
                self._promises.forget(entry)

    def _evict(self, entry: Entry, keep: Entry | None = None) -> None:
        """Take a session's pages: to host memory if it can hold them, at the cost of the session longest there."""
        pages = entry.session.sequence.num_pages
        for other in swapped_first(self._entries) if pages <= self._pool.swap_pages else ():
            if self._pool.can_swap(pages):
                break
            if other is not keep:
                self._lose(other)
        if self._pool.can_swap(pages):
            self._promises.forget(entry)
            entry.session.swap_out()
            self._metrics.evictions.labels(SWAPPED).inc()
        else:
            self._lose(entry)

    def _lose(self, entry: Entry) -> None:
        is_awaited = bool(entry.session.queued)
        entry.session.lose()
        self.forget(entry)
        self._metrics.evictions.labels(DROPPED).inc()
        if is_awaited and entry.mailbox is not None:
            entry.send(entry.session.resync())

    def lose_uncopied(self, edits: Iterable[CacheEdit], is_held: Callable[[int], bool]) -> None:
        """After a pass that failed: lose the sessions that its edits should have copied out and did not.

        `is_held` says whether the pages of a ticket lie in host memory.
        """
        gone = {edit.ticket for edit in edits if isinstance(edit, SwapOut) and not is_held(edit.ticket)}
        for entry in list(self._entries):
            if entry.session.sequence.ticket in gone:
                self._lose(entry)


def _tables(entries: Iterable[Entry]) -> list[tuple[int, ...]]:
    return [entry.session.sequence.block_table for entry in entries]
