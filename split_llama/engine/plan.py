"""Batch plans: what one pass over a segment does, as immutable integers. Pure.

A pass takes rows of several sequences back to back, `states[rows, hidden]`, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from split_llama.config import BlockRange
from split_llama.engine.pages import CacheEdit
from split_llama.mask import MaskDescriptor, rotary_position


@dataclass(frozen=True, slots=True)
class SequenceRun:
    """One sequence's share of a pass: `count` new rows at slots `[first, first + count)`.

    `block_table` lists the sequence's pages. `tree` holds the ancestor bits of a draft tree's rows, else it is `None`.
    `adapter` is the number of the rows' adapter, -1 for none.
    """

    blocks: BlockRange
    block_table: tuple[int, ...]
    mask: MaskDescriptor
    first: int
    count: int
    tree: tuple[int, ...] | None = None
    adapter: int = -1

    def ancestors(self, row: int) -> int:
        """Give the ancestor bits of a row; 0 outside a tree."""
        return self.tree[row] if self.tree is not None else 0

    def rotary_positions(self) -> Iterator[int]:
        """Yield the rotary position of each row."""
        for row in range(self.count):
            yield rotary_position(self.mask, self.first + row, self.ancestors(row))

    def cache_slots(self, page_size: int) -> Iterator[int]:
        """Yield the cache slot of each row."""
        for slot in range(self.first, self.first + self.count):
            yield self.block_table[slot // page_size] * page_size + slot % page_size


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive blocks in which the same runs take part; `runs` are indices into the plan's runs."""

    blocks: BlockRange
    runs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One pass: cache edits first, in order, then the rows of all runs."""

    runs: tuple[SequenceRun, ...]
    edits: tuple[CacheEdit, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return sum(run.count for run in self.runs)

    def row_ranges(self) -> list[range]:
        """Give each run's rows in the batch."""
        ranges, start = [], 0
        for run in self.runs:
            ranges.append(range(start, start + run.count))
            start += run.count
        return ranges

    def stages(self) -> list[Stage]:
        """Cut the pass where a run joins or leaves, so that runs of different block ranges share the blocks between."""
        cuts = sorted({bound for run in self.runs for bound in (run.blocks.start, run.blocks.stop)})
        stages = []
        for start, stop in pairwise(cuts):
            span = BlockRange(start, stop)
            runs = tuple(i for i, run in enumerate(self.runs) if run.blocks.contains(span))
            if runs:
                stages.append(Stage(span, runs))
        return stages
