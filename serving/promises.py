"""Free pages that are promised: to sessions that are generating, for the tokens they will want next. Pure.

Nothing is set apart. A promise says how many of the free pages others must leave alone, so the promises together never
exceed the free pages. Whoever takes pages asks `free_for` first, and its promise is renewed right afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Promises(Generic[K]):
    """How many pages each of the keys has been promised."""

    def __init__(self) -> None:
        self._pages: dict[K, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """Pages promised to all together."""
        return self._total

    def __iter__(self) -> Iterator[K]:
        return iter(self._pages)

    def of(self, key: K) -> int:
        """Pages promised to `key`."""
        return self._pages.get(key, 0)

    def free_for(self, key: K, free: int) -> int:
        """Give how many of `free` pages `key` may take: those promised to it, and those promised to nobody."""
        return free - self._total + self.of(key)

    def renew(self, key: K, pages: int, free: int) -> None:
        """Promise `key` so many pages from now on, or as many as nobody else was promised out of `free`.

        Whatever `key` was promised before is replaced: it may have been taken since.
        """
        self._set(key, max(0, min(pages, self.free_for(key, free))))

    def forget(self, key: K) -> None:
        """Promise `key` nothing any more."""
        self._set(key, 0)

    def _set(self, key: K, pages: int) -> None:
        self._total += pages - self._pages.pop(key, 0)
        if pages:
            self._pages[key] = pages

    def check_integrity(self, free: int) -> None:
        """Assert that what was promised is there."""
        assert self._total == sum(self._pages.values()), "the total is off"
        assert all(pages > 0 for pages in self._pages.values()), "an empty promise is kept"
        assert self._total <= free, "more is promised than free"
