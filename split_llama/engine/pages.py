"""KV pages: who holds which, and what must happen to their contents before the next pass. Pure bookkeeping.

A page is a run of `page_size` KV slots in every hosted block. Slot `s` of a sequence lies in its page `s // page_size`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from split_llama.engine.free_runs import FreeRuns
from split_llama.errors import OutOfPages


@dataclass(frozen=True, slots=True)
class ZeroPages:
    """Clear pages that are about to change owner."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyPage:
    """Copy the first `slots` slots of page `source` to page `target`."""

    source: int
    target: int
    slots: int


@dataclass(frozen=True, slots=True)
class MoveSlots:
    """Move cache slots (`page * page_size + offset`), all sources being read before any target is written."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapOut:
    """Copy whole pages to host memory, under a ticket."""

    pages: tuple[int, ...]
    ticket: int


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Copy what lies under a ticket into whole pages, in its old order, and forget the ticket."""

    ticket: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DropSwap:
    """Forget what lies under a ticket."""

    ticket: int


CacheEdit = ZeroPages | CopyPage | MoveSlots | SwapOut | SwapIn | DropSwap


class PagePool:
    """Hands out reference-counted pages and keeps the cache edits that this causes, in order, until a plan takes them.

    The order is the pool's and not a sequence's: a page may be copied for one sequence, freed, and cleared for another.
    Up to `swap_pages` pages' contents may lie in host memory instead, under tickets.
    """

    def __init__(self, num_pages: int, page_size: int, swap_pages: int = 0) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.swap_pages = swap_pages
        self._holders = [0] * num_pages
        self._free = FreeRuns(num_pages)
        self._used_before = bytearray(num_pages)
        self._edits: list[CacheEdit] = []
        self._swapped: dict[int, int] = {}
        self._num_swapped = 0
        self._next_ticket = 0

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages held by at least one sequence."""
        return self.num_pages - len(self._free)

    @property
    def num_swapped(self) -> int:
        """Pages whose contents lie in host memory."""
        return self._num_swapped

    def allocate(self, count: int, after: int | None = None) -> tuple[int, ...]:
        """Take `count` pages, those behind page `after` if they are free; their old contents are cleared first.

        Raises `OutOfPages` and then takes none.
        """
        pages = self._take(count, after)
        stale = tuple(page for page in pages if self._used_before[page])
        if stale:
            self.record(ZeroPages(stale))
        return self._own(pages)

    def _take(self, count: int, after: int | None = None) -> tuple[int, ...]:
        if count > len(self._free):
            raise OutOfPages(
                f"{count} KV pages of {self.page_size} slots needed, {len(self._free)} of {self.num_pages} free; "
                "try again when other sessions end",
                retry_after_ms=1000,
            )
        return tuple(self._free.take(count, after))

    def _own(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        for page in pages:
            self._holders[page] = 1
            self._used_before[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one holder from each page; a page without holders is free."""
        freed = []
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free already"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                freed.append(page)
        self._free.give_back(freed)

    def is_shared(self, page: int) -> bool:
        """Say whether more than one sequence holds the page, so that nobody may write to it."""
        return self._holders[page] > 1

    def count_freed(self, tables: Iterable[Sequence[int]]) -> int:
        """Give how many pages would be free if all these block tables were released."""
        counted = Counter(page for table in tables for page in table)
        return sum(self._holders[page] == count for page, count in counted.items())

    def can_swap(self, count: int) -> bool:
        """Say whether host memory has room for `count` more pages."""
        return self._num_swapped + count <= self.swap_pages

    def swap_out(self, pages: Sequence[int]) -> int:
        """Copy pages to host memory and take one holder from each; gives the ticket. There must be room for them.

        A page that others hold stays theirs; who comes back from host memory has a copy of its own.
        """
        assert self.can_swap(len(pages)), "host memory has no room"
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._swapped[ticket] = len(pages)
        self._num_swapped += len(pages)
        self.record(SwapOut(tuple(pages), ticket))
        self.release(pages)
        return ticket

    def swap_in(self, ticket: int) -> tuple[int, ...]:
        """Bring a ticket's pages back. Raises `OutOfPages`, and then they stay where they are."""
        pages = self._own(self._take(self._swapped[ticket]))
        self._num_swapped -= self._swapped.pop(ticket)
        self.record(SwapIn(ticket, pages))
        return pages

    def drop_swap(self, ticket: int) -> None:
        """Forget a ticket's pages."""
        self._num_swapped -= self._swapped.pop(ticket)
        self.record(DropSwap(ticket))

    def record(self, edit: CacheEdit) -> None:
        """Append a cache edit for the next plan."""
        self._edits.append(edit)

    def take_edits(self) -> tuple[CacheEdit, ...]:
        """Hand over the edits recorded since the last call, in order; they must be applied before the plan's rows."""
        edits, self._edits = tuple(self._edits), []
        return edits

    def check_integrity(self, tables: Iterable[Sequence[int]], tickets: Iterable[int] = ()) -> None:
        """Assert that block tables and tickets of all living sequences account for every page exactly."""
        counted = Counter(page for table in tables for page in table)
        assert all(self._holders[page] == counted[page] for page in range(self.num_pages)), "a holder count is off"
        self._free.check_integrity()
        assert list(self._free) == [p for p in range(self.num_pages) if not counted[p]], "the free list is off"
        assert sorted(self._swapped) == sorted(tickets), "a ticket is lost or has no owner"
        assert self._num_swapped == sum(self._swapped.values()) <= self.swap_pages, "the swapped pages are miscounted"
