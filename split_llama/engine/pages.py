"""KV pages: who holds which, and what must happen to their contents before the next pass. Pure bookkeeping.

A page is a run of `page_size` KV slots in every hosted block. Slot `s` of a sequence lies in its page `s // page_size`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


CacheEdit = ZeroPages | CopyPage | MoveSlots


class PagePool:
    """Hands out reference-counted pages and keeps the cache edits that this causes, in order, until a plan takes them.

    The order is the pool's and not a sequence's: a page may be copied for one sequence, freed, and cleared for another.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._holders = [0] * num_pages
        # A heap gives the lowest page first, so that a lone sequence gets consecutive pages.
        self._free = list(range(num_pages))
        self._used_before: set[int] = set()
        self._edits: list[CacheEdit] = []

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages held by at least one sequence."""
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` pages; their old contents are cleared first. Raises `OutOfPages` and then takes none."""
        if count > len(self._free):
            raise OutOfPages(
                f"{count} KV pages of {self.page_size} slots needed, {len(self._free)} of {self.num_pages} free; "
                "try again when other sessions end",
                retry_after_ms=1000,
            )
        pages = tuple(heapq.heappop(self._free) for _ in range(count))
        for page in pages:
            self._holders[page] = 1
        stale = tuple(page for page in pages if page in self._used_before)
        if stale:
            self.record(ZeroPages(stale))
        self._used_before.update(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one holder from each page; a page without holders is free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free already"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heapq.heappush(self._free, page)

    def is_shared(self, page: int) -> bool:
        """Say whether more than one sequence holds the page, so that nobody may write to it."""
        return self._holders[page] > 1

    def record(self, edit: CacheEdit) -> None:
        """Append a cache edit for the next plan."""
        self._edits.append(edit)

    def take_edits(self) -> tuple[CacheEdit, ...]:
        """Hand over the edits recorded since the last call, in order; they must be applied before the plan's rows."""
        edits, self._edits = tuple(self._edits), []
        return edits

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the block tables of all living sequences account for every page exactly."""
        counted = Counter(page for table in tables for page in table)
        assert all(self._holders[page] == counted[page] for page in range(self.num_pages)), "a holder count is off"
        assert sorted(self._free) == [p for p in range(self.num_pages) if not counted[p]], "the free list is off"
