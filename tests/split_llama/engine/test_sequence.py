"""Pages and sequences as a state machine against a simple model: each sequence is a list of row values."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from split_llama.config import BlockRange
from split_llama.draft_tree import check_tree, is_chain
from split_llama.engine.pages import CopyPage, DropSwap, MoveSlots, PagePool, SwapIn, SwapOut, ZeroPages
from split_llama.engine.plan import SequenceRun
from split_llama.engine.sequence import Sequence
from split_llama.errors import BadRequest, ContextExceeded, OutOfPages, PositionGap

BLOCKS = BlockRange(1, 3)


class SlotMemory:
    """What the KV cache would hold: one value per slot, changed by edits and by rows."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.values: dict[int, int | None] = {}
        self.host: dict[int, list[int | None]] = {}

    def run(self, run: SequenceRun, rows: list[int]) -> None:
        """Apply the recorded edits and write the rows, as one pass does."""
        size = self.pool.page_size
        for edit in self.pool.take_edits():
            match edit:
                case ZeroPages(pages):
                    for page in pages:
                        for slot in range(page * size, (page + 1) * size):
                            self.values[slot] = 0
                case CopyPage(source, target, slots):
                    for offset in range(slots):
                        self.values[target * size + offset] = self.values[source * size + offset]
                case MoveSlots(sources, targets):
                    moved = [self.values[slot] for slot in sources]
                    self.values.update(zip(targets, moved, strict=True))
                case SwapOut(pages, ticket):
                    assert ticket not in self.host
                    self.host[ticket] = [self.values.get(slot) for slot in self.slots(pages)]
                case SwapIn(ticket, pages):
                    for slot, value in zip(self.slots(pages), self.host.pop(ticket), strict=True):
                        self.values[slot] = value
                case DropSwap(ticket):
                    del self.host[ticket]
        assert sum(map(len, self.host.values())) == self.pool.num_swapped * size
        for slot, value in zip(run.cache_slots(size), rows, strict=True):
            self.values[slot] = value

    def slots(self, pages: tuple[int, ...]) -> list[int]:
        """The cache slots of pages."""
        return [page * self.pool.page_size + offset for page in pages for offset in range(self.pool.page_size)]

    def read(self, sequence: Sequence, length: int) -> list[int | None]:
        """The values at the sequence's first `length` slots, found through its block table or its ticket."""
        if sequence.ticket is not None:
            return self.host[sequence.ticket][:length]
        return [self.values[slot] for slot in self.slots(sequence.block_table)[:length]]


class Modelled:
    """A sequence beside the list of rows it ought to hold, and its pending draft."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.rows: list[int] = []
        self.draft: list[int] = []
        self.tree: tuple[int, ...] = ()


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, ...]:
    """Ancestor bits of a random rooted tree."""
    bits = [1]
    for node in range(1, draw(st.integers(1, 9))):
        bits.append(bits[draw(st.integers(0, node - 1))] | 1 << node)
    return tuple(bits)


class SequenceMachine(RuleBasedStateMachine):
    """Append, draft, accept, roll back, fork, swap and free in any order."""

    living = Bundle("living")

    @initialize(pages=st.integers(4, 24), size=st.sampled_from([1, 2, 4, 8]))
    def start(self, pages: int, size: int) -> None:
        self.pool = PagePool(pages, size, swap_pages=8)
        self.memory = SlotMemory(self.pool)
        self.all: list[Modelled] = []
        self.next_value = 1

    def fresh(self, count: int) -> list[int]:
        self.next_value += count
        return list(range(self.next_value - count, self.next_value))

    @rule(target=living)
    def open(self) -> Modelled:
        self.all.append(Modelled(Sequence(self.pool, BLOCKS, max_length=60)))
        return self.all[-1]

    @rule(item=living, count=st.integers(1, 20))
    def append(self, item: Modelled, count: int) -> None:
        if not self.here(item):
            return
        if item.draft:
            item.sequence.truncate(len(item.rows))
            item.draft = []
        needed = item.sequence.pages_needed(item.sequence.length, item.sequence.length + count)
        before = item.sequence.block_table, item.sequence.length, self.pool.num_free
        try:
            run = item.sequence.append(count)
        except (OutOfPages, ContextExceeded) as error:
            assert isinstance(error, ContextExceeded) or needed > self.pool.num_free
            assert before == (item.sequence.block_table, item.sequence.length, self.pool.num_free)
            return
        assert before[2] - self.pool.num_free == needed
        rows = self.fresh(count)
        self.memory.run(run, rows)
        item.rows += rows

    @rule(item=living, tree=trees())
    def draft(self, item: Modelled, tree: tuple[int, ...]) -> None:
        if item.draft or not self.here(item):
            return
        try:
            run = item.sequence.append_draft(tree)
        except (OutOfPages, ContextExceeded):
            return
        item.draft, item.tree = self.fresh(len(tree)), tree
        self.memory.run(run, item.draft)

    @rule(item=living, leaf=st.integers(0, 9))
    def accept(self, item: Modelled, leaf: int) -> None:
        if leaf >= len(item.draft) or not self.here(item):
            return
        nodes = tuple(node for node in range(leaf + 1) if item.tree[leaf] >> node & 1)
        item.sequence.accept(nodes)
        item.rows += [item.draft[node] for node in nodes]
        item.draft = []

    @rule(item=living, fraction=st.floats(0, 1))
    def truncate(self, item: Modelled, fraction: float) -> None:
        if not self.here(item):
            return
        whole = item.rows + (item.draft if is_chain(item.tree) else [])
        length = int(fraction * len(whole))
        item.sequence.truncate(length)
        item.rows, item.draft = whole[:length], []

    @rule(target=living, item=living, fraction=st.floats(0, 1))
    def fork(self, item: Modelled, fraction: float) -> Modelled:
        if not self.here(item):
            return self.open()
        at = int(fraction * len(item.rows))
        child = Modelled(item.sequence.fork(at))
        child.rows = item.rows[:at]
        self.all.append(child)
        return child

    @rule(item=living)
    def swap_out(self, item: Modelled) -> None:
        sequence = item.sequence
        if sequence.ticket is None and self.pool.can_swap(sequence.num_pages):
            alone = sum(not self.pool.is_shared(page) for page in sequence.block_table)
            free = self.pool.num_free
            sequence.swap_out()
            assert self.pool.num_free == free + alone

    def here(self, item: Modelled) -> bool:
        """Bring the sequence back if there is room."""
        sequence = item.sequence
        if sequence.ticket is None:
            return True
        free = self.pool.num_free
        needed = sequence.pages_needed(sequence.length, sequence.length)
        try:
            sequence.swap_in()
        except OutOfPages:
            assert needed > free
            assert (sequence.ticket is None, self.pool.num_free) == (False, free)
            return False
        assert free - self.pool.num_free == needed
        return True

    @rule(item=consumes(living))
    def free(self, item: Modelled) -> None:
        item.sequence.free()
        self.all.remove(item)

    @invariant()
    def contents_and_pages_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(
            [item.sequence.block_table for item in self.all],
            [item.sequence.ticket for item in self.all if item.sequence.ticket is not None],
        )
        # Moves recorded by accept have not been applied yet: a pass without rows does it.
        self.memory.run(SequenceRun(BLOCKS, (), None, 0, 0), [])  # type: ignore[arg-type]
        for item in self.all:
            assert item.sequence.committed == len(item.rows)
            assert item.sequence.length == len(item.rows) + len(item.draft)
            assert self.memory.read(item.sequence, item.sequence.length) == item.rows + item.draft


TestSequenceMachine = SequenceMachine.TestCase
TestSequenceMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_pages_are_cleared_before_another_owner_gets_them() -> None:
    pool = PagePool(2, 4)
    first = Sequence(pool, BLOCKS, 100)
    first.append(8)
    assert pool.take_edits() == ()
    first.free()
    Sequence(pool, BLOCKS, 100).append(5)
    assert pool.take_edits() == (ZeroPages((0, 1)),)


def test_a_full_pool_refuses_and_says_how_much_is_missing() -> None:
    pool = PagePool(2, 4)
    sequence = Sequence(pool, BLOCKS, 100)
    with pytest.raises(OutOfPages, match="3 KV pages of 4 slots needed, 2 of 2 free") as error:
        sequence.append(9)
    assert error.value.retry_after_ms > 0


def test_a_context_overflow_names_both_lengths() -> None:
    with pytest.raises(ContextExceeded, match=r"12 positions.*holds 10"):
        Sequence(PagePool(9, 4), BLOCKS, 10).append(12)


def test_positions_beyond_the_end_are_refused() -> None:
    sequence = Sequence(PagePool(9, 4), BLOCKS, 10)
    sequence.append(3)
    with pytest.raises(PositionGap):
        sequence.truncate(4)
    with pytest.raises(PositionGap):
        sequence.fork(4)


@pytest.mark.parametrize("tree", [(), (2,), (1, 2), (1, 1), (1, 3, 6), (1, 3, 5, 15), tuple([1] * 65), (1, 0b111)])
def test_malformed_trees_are_refused(tree: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest):
        check_tree(tree)


def test_accept_must_be_a_path_from_the_root() -> None:
    sequence = Sequence(PagePool(9, 4), BLOCKS, 30)
    sequence.append_draft((1, 0b11, 0b101, 0b1101))
    for nodes in [(1,), (0, 3), (0, 1, 2), (0, 2, 1), (0, 9)]:
        with pytest.raises(BadRequest):
            sequence.accept(nodes)
    sequence.accept((0, 2, 3))
    assert (sequence.length, sequence.committed) == (3, 3)


def test_a_pending_tree_cannot_be_cut_but_a_chain_can() -> None:
    tree, chain = (Sequence(PagePool(9, 4), BLOCKS, 30) for _ in range(2))
    tree.append_draft((1, 0b11, 0b101))
    with pytest.raises(BadRequest, match="accept"):
        tree.truncate(2)
    chain.append_draft((1, 0b11, 0b111))
    chain.truncate(2)
    assert chain.committed == 2
