"""Mask descriptors: which keys a query may see, in a handful of integers instead of a matrix.

Key slot `k` is visible to a query at slot `pos` when `kv_begin <= k < kv_len` and

- `k >= tail_begin` (a draft tree): bit `k - tail_begin` of the row's ancestor bits is set;
- otherwise `k <= pos` and (`k < sink_end` or `window == 0` or `k > pos - window`).

`rope_offset`, and for drafts the depth in the tree, turn a slot into a rotary position. The window belongs to the
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_TREE_NODES = 64
NO_TAIL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class MaskDescriptor:
    """Per-sequence integers of the mask, all in slots.

    `kv_len` is the number of slots in use once this step's rows are written. Slots before `kv_begin` are evicted or
    left padding. Slots below `sink_end` stay visible whatever the window. From `tail_begin` on the slots hold the
    nodes of a draft tree. A query at slot `s` below the tail has rotary position `s + rope_offset`.
    """

    kv_len: int
    kv_begin: int = 0
    sink_end: int = 0
    tail_begin: int = NO_TAIL
    rope_offset: int = 0


def is_visible(mask: MaskDescriptor, window: int, pos: int, ancestors: int, k: int) -> bool:
    """Say whether key slot `k` is visible to the query at slot `pos` with ancestor bits (0 below the tail)."""
    if not mask.kv_begin <= k < mask.kv_len:
        return False
    if k >= mask.tail_begin:
        return bool(ancestors >> (k - mask.tail_begin) & 1)
    return k <= pos and (k < mask.sink_end or window == 0 or k > pos - window)


def rotary_position(mask: MaskDescriptor, pos: int, ancestors: int) -> int:
    """Give the rotary position of the row at slot `pos`; a tree node counts by its depth, not by its slot."""
    if pos < mask.tail_begin:
        return pos + mask.rope_offset
    return mask.tail_begin + ancestors.bit_count() - 1 + mask.rope_offset


def to_dense(
    mask: MaskDescriptor, window: int, first: int, count: int, tree: Sequence[int] | None = None
) -> list[list[bool]]:
    """Spell the mask out as `[count, kv_len]` booleans: the oracle that tests use and nothing else.

    `tree` holds one int of ancestor bits (self included) per row; `None` for rows below the tail.
    """
    bits = tree if tree is not None else [0] * count
    return [[is_visible(mask, window, first + row, bits[row], k) for k in range(mask.kv_len)] for row in range(count)]
