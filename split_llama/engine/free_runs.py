"""Which pages are free, as runs of consecutive ones, so that what grows together can lie together. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

_STALE_ENTRIES = 64


class FreeRuns:
    """The free pages out of `[0, num_pages)`, kept as maximal runs; each operation costs O(log runs) amortised.

    `take` follows on from a given page where that is free. What cannot follow on begins in the middle of the longest
    run: whoever holds the page before the run can then grow into one half of it, and the newcomer into the other.
    """

    def __init__(self, num_pages: int) -> None:
        self._stops: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        # Entries are (-length, start). Those of runs that have changed since stay until they surface.
        self._longest: list[tuple[int, int]] = []
        self._count = num_pages
        if num_pages:
            self._add(0, num_pages)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Yield all free pages in ascending order."""
        for start in sorted(self._stops):
            yield from range(start, self._stops[start])

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` free pages, those behind page `after` first. There must be as many."""
        assert count <= self._count, "fewer pages are free"
        pages: list[int] = []
        while len(pages) < count:
            wanted = count - len(pages)
            if after is not None and after + 1 in self._stops:
                run = start = after + 1
            else:
                run = self._longest_run()
                start = run + self._room_before(run, wanted)
            pages += self._cut(run, start, start + wanted)
            after = pages[-1]
        return pages

    def _room_before(self, run: int, wanted: int) -> int:
        """Say how many pages of a run stay free before the `wanted` ones; nobody grows into it from before page 0."""
        return 0 if run == 0 else max(0, self._stops[run] - run - wanted + 1) // 2

    def _longest_run(self) -> int:
        while True:
            length, start = self._longest[0]
            if self._stops.get(start) == start - length:
                return start
            heapq.heappop(self._longest)

    def _cut(self, run: int, start: int, stop: int) -> range:
        """Take the pages `[start, stop)` of a run, as far as it goes."""
        end = self._stops.pop(run)
        del self._starts[end]
        stop = min(stop, end)
        if run < start:
            self._add(run, start)
        if stop < end:
            self._add(stop, end)
        self._count -= stop - start
        return range(start, stop)

    def give_back(self, pages: Iterable[int]) -> None:
        """Make pages free; none of them may be."""
        start = stop = -1
        for page in sorted(pages):
            if page != stop:
                self._merge(start, stop)
                start = page
            stop = page + 1
        self._merge(start, stop)

    def _merge(self, start: int, stop: int) -> None:
        """Add a run to the runs beside it."""
        if start == stop:
            return
        self._count += stop - start
        if start in self._starts:
            start = self._starts.pop(start)
        if stop in self._stops:
            stop = self._stops.pop(stop)
        self._add(start, stop)

    def _add(self, start: int, stop: int) -> None:
        self._stops[start] = stop
        self._starts[stop] = start
        heapq.heappush(self._longest, (start - stop, start))
        if len(self._longest) > 2 * len(self._stops) + _STALE_ENTRIES:
            self._longest = [(first - last, first) for first, last in self._stops.items()]
            heapq.heapify(self._longest)

    def check_integrity(self) -> None:
        """Assert that the runs are maximal, counted, and known from both ends."""
        assert self._starts == {stop: start for start, stop in self._stops.items()}, "the ends of the runs disagree"
        assert all(start < stop and stop not in self._stops for start, stop in self._stops.items()), "runs touch"
        assert self._count == sum(stop - start for start, stop in self._stops.items()), "the count is off"
        entries = set(self._longest)
        assert all((start - stop, start) in entries for start, stop in self._stops.items()), "a run was forgotten"
