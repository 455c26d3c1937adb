"""One growing sequence: its block table, its length, and the draft that is still tentative. Pure bookkeeping.

Rows are committed as they are appended. A draft's rows are tentative until `accept` or `truncate` says which stay:
they lie at `[committed, length)`.
"""

from __future__ import annotations

from split_llama.config import BlockRange
from split_llama.draft_tree import check_path, check_tree, is_chain
from split_llama.engine.pages import CopyPage, MoveSlots, PagePool
from split_llama.engine.plan import SequenceRun
from split_llama.errors import BadRequest, ContextExceeded, PositionGap
from split_llama.mask import MaskDescriptor


class Sequence:
    """Block table and lengths of one sequence; every method either succeeds or leaves all as it was.

    A page shared with a fork is copied before it is written to. The sequence owns its share of its pages until `free`.
    Between `swap_out` and `swap_in` their contents lie in host memory, and only lengths may be asked for.
    """

    def __init__(self, pool: PagePool, blocks: BlockRange, max_length: int, adapter: int = -1) -> None:
        self.blocks = blocks
        self.adapter = adapter
        self.max_length = max_length
        self._pool = pool
        self._table: list[int] = []
        self._length = 0
        self._draft: tuple[int, ...] = ()
        self._ticket: int | None = None

    @property
    def length(self) -> int:
        """Slots in use, tentative ones included."""
        return self._length

    @property
    def committed(self) -> int:
        """Slots whose rows stay; equal to `length` unless a draft is pending."""
        return self._length - len(self._draft)

    @property
    def block_table(self) -> tuple[int, ...]:
        """Pages in the order of their slots."""
        return tuple(self._table)

    @property
    def ticket(self) -> int | None:
        """The pool's ticket while the contents lie in host memory."""
        return self._ticket

    @property
    def num_pages(self) -> int:
        """Pages that the slots in use take, here or in host memory."""
        return -(-self._length // self._pool.page_size)

    def pages_needed(self, first: int, end: int) -> int:
        """Give how many more pages the pool must have for slots `[first, end)` to be written behind `first` kept ones.

        Negative when pages are left over. Counts a copy of a shared page, and the way back from host memory.
        """
        size = self._pool.page_size
        wanted = -(-end // size)
        if self._ticket is not None:
            # All pages come back before any is dropped.
            return max(wanted, self.num_pages)
        keep = -(-first // size)
        freed = sum(not self._pool.is_shared(page) for page in self._table[keep:]) if keep < len(self._table) else 0
        copies = first % size != 0 and self._pool.is_shared(self._table[keep - 1])
        return wanted - keep + copies - freed

    def append(self, count: int) -> SequenceRun:
        """Add `count` committed rows. Raises `ContextExceeded`, `OutOfPages`."""
        assert not self._draft, "accept or truncate the draft first"
        return self._grow(count, None)

    def append_draft(self, tree: tuple[int, ...]) -> SequenceRun:
        """Add one tentative row per node of `tree` (see `check_tree`). Raises `BadRequest` and what `append` raises."""
        assert not self._draft, "accept or truncate the draft first"
        check_tree(tree)
        run = self._grow(len(tree), tree)
        self._draft = tree
        return run

    def _grow(self, count: int, tree: tuple[int, ...] | None) -> SequenceRun:
        first, end = self._length, self._length + count
        if end > self.max_length:
            raise ContextExceeded(
                f"the sequence would grow to {end} positions, the context holds {self.max_length}; shorten the prompt"
            )
        self._reserve(first, end)
        self._length = end
        mask = MaskDescriptor(kv_len=end) if tree is None else MaskDescriptor(kv_len=end, tail_begin=first)
        return SequenceRun(self.blocks, self.block_table, mask, first, count, tree, self.adapter)

    def _reserve(self, first: int, end: int) -> None:
        """Make the slots `[first, end)` writable: new pages, and a copy of a shared page that is partly filled."""
        assert self._ticket is None, "swap the sequence in first"
        size = self._pool.page_size
        held = len(self._table)
        shared = first // size if first < held * size and self._pool.is_shared(self._table[first // size]) else None
        needed = max(0, -(-end // size) - held)
        if not needed and shared is None:
            return
        last = self._table[-1] if held and shared is None else None
        pages = self._pool.allocate(needed + (shared is not None), after=last)
        if shared is not None:
            copy, *pages_left = pages
            self._pool.record(CopyPage(self._table[shared], copy, slots=first % size))
            self._pool.release([self._table[shared]])
            self._table[shared] = copy
            pages = tuple(pages_left)
        self._table.extend(pages)

    def accept(self, nodes: tuple[int, ...]) -> None:
        """Keep the draft nodes `nodes`, root to leaf, move their slots into place and drop the rest.

        Raises `BadRequest` when they are not a path from the root of the pending draft.
        """
        check_path(nodes, len(self._draft), self._draft)
        base = self.committed
        moves = [(base + node, base + place) for place, node in enumerate(nodes) if node != place]
        if moves:
            sources, targets = zip(*((self._cache_slot(a), self._cache_slot(b)) for a, b in moves), strict=True)
            self._pool.record(MoveSlots(sources, targets))
        self._drop_from(base + len(nodes))

    def truncate(self, length: int) -> None:
        """Drop all slots from `length` on; of a pending draft, a chain keeps its prefix and becomes committed.

        Raises `PositionGap` beyond the end, `BadRequest` when a pending draft is a tree and `length` cuts into it.
        """
        if length > self._length:
            raise PositionGap(f"position {length} lies beyond the sequence's {self._length} positions")
        if length > self.committed and not is_chain(self._draft):
            raise BadRequest(
                f"position {length} cuts into a pending draft tree at {self.committed}; say which nodes to accept"
            )
        self._drop_from(length)

    def _drop_from(self, length: int) -> None:
        assert self._ticket is None, "swap the sequence in first"
        self._length, self._draft = length, ()
        keep = -(-length // self._pool.page_size)
        self._pool.release(self._table[keep:])
        del self._table[keep:]

    def fork(self, at: int) -> Sequence:
        """Share the first `at` committed slots with a new sequence, without copying. Raises `PositionGap`."""
        assert self._ticket is None, "swap the sequence in first"
        if not 0 <= at <= self.committed:
            raise PositionGap(f"cannot fork at {at}: the sequence has {self.committed} committed positions")
        child = Sequence(self._pool, self.blocks, self.max_length, self.adapter)
        child._table = self._table[: -(-at // self._pool.page_size)]
        child._length = at
        self._pool.share(child._table)
        return child

    def swap_out(self) -> None:
        """Move the contents to host memory and give the pages up; the pool must have room (`can_swap`)."""
        assert self._ticket is None, "the sequence is in host memory already"
        self._ticket = self._pool.swap_out(self._table)
        self._table = []

    def swap_in(self) -> None:
        """Take pages again and bring the contents back. Raises `OutOfPages`."""
        assert self._ticket is not None, "the sequence is not in host memory"
        self._table = list(self._pool.swap_in(self._ticket))
        self._ticket = None

    def free(self) -> None:
        """Give all pages back, or forget what lies in host memory; the sequence is empty afterwards."""
        if self._ticket is not None:
            self._pool.drop_swap(self._ticket)
            self._ticket = None
        self._drop_from(0)

    def _cache_slot(self, slot: int) -> int:
        size = self._pool.page_size
        return self._table[slot // size] * size + slot % size
