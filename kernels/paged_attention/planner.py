"""The host's share of attention: which tiles each query tile reads, as rows of integers. Pure Python.

A query tile is `tiles.rows` packed rows: query rows times the query heads that share a key-value head. Its visible
keys are cut into chunks, one work item each, so that one long sequence keeps a whole device busy; a combine then joins
the items' results. Everything follows from a sequence's own shape, so it is the same alone and in any batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from split_llama.mask import MaskDescriptor

# Fields of a row of integers, as kernel.py reads them.
ITEM_FIELDS = 8
COMBINE_FIELDS = 4
SEQUENCE_FIELDS = 4
WRITES_OUTPUT = -1
# Slots of a chunk where a query has one query tile. Chunks are aligned to multiples of their size in the sequence.
CHUNK = 512

Range = tuple[int, int]


class Query(Protocol):
    """One sequence's rows of a pass: `count` rows at slots from `first`; `tree` holds a draft tree's ancestor bits."""

    @property
    def mask(self) -> MaskDescriptor: ...  # noqa: D102

    @property
    def first(self) -> int: ...  # noqa: D102

    @property
    def count(self) -> int: ...  # noqa: D102

    @property
    def tree(self) -> tuple[int, ...] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of a launch: packed query `rows` and `keys`, powers of two, at least 16 and at most a chunk."""

    rows: int
    keys: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one launch does. All in int32 rows, flat.

    `items`, 8 each: sequence, first row and number of rows in the batch, two half-open ranges of key tiles (the first
    often the sinks or empty), scratch slot or -1: the item alone serves its query tile and writes the output itself.
    `combines`, 4 each: first row, number of rows, first scratch slot, number of slots.
    """

    tiles: Tiles
    items: array[int]
    combines: array[int]
    num_slots: int


@dataclass(frozen=True, slots=True)
class RowValues:
    """What the kernel reads besides a plan: `sequences` int32, 4 each; per row `row_slots` int32, `ancestors` int64."""

    sequences: array[int]
    row_slots: array[int]
    ancestors: array[int]


def chunk_slots(query_tiles: int) -> int:
    """Slots of a chunk for a query of so many query tiles.

    Query tiles fill a device as chunks do, and every cut costs a write and a read of partial results. So chunks grow
    with the number of query tiles.
    """
    return CHUNK << max(query_tiles - 1, 0).bit_length()


def plan_attention(
    queries: Sequence[Query], *, window: int, tiles: Tiles, group: int, members: Collection[int] | None = None
) -> AttentionPlan:
    """Plan one launch over the rows of `queries`, which lie back to back in the batch.

    `group` is the number of query heads per key-value head, `window` the layer's (0: none). Of the queries only
    `members` (indices; all where `None`) take part: those whose shape calls for these tiles.
    """
    items, combines = array("i"), array("i")
    rows_per_tile = tiles.rows // group
    slots = row = 0
    for index, query in enumerate(queries):
        begin, row = row, row + query.count
        if members is not None and index not in members:
            continue
        chunk = chunk_slots(-(-query.count // rows_per_tile)) // tiles.keys
        # From the last rows, which see most: long items start first, and short ones fill the gaps at the end.
        for offset in range((query.count - 1) // rows_per_tile * rows_per_tile, -1, -rows_per_tile):
            count = min(rows_per_tile, query.count - offset)
            work = _pack(_cut(_visible_tiles(query, window, tiles.keys, offset, count), chunk), chunk)
            if len(work) == 1:
                items.extend((index, begin + offset, count, *work[0], WRITES_OUTPUT))
                continue
            for slot, ranges in enumerate(work, slots):
                items.extend((index, begin + offset, count, *ranges, slot))
            combines.extend((begin + offset, count, slots, len(work)))
            slots += len(work)
    return AttentionPlan(tiles, items, combines, slots)


def row_values(queries: Sequence[Query]) -> RowValues:
    """List the descriptors of the sequences, and slot and ancestor bits of each row of the batch."""
    sequences, row_slots, ancestors = array("i"), array("i"), array("q")
    for query in queries:
        mask = query.mask
        sequences.extend((mask.kv_begin, mask.kv_len, mask.sink_end, mask.tail_begin))
        row_slots.extend(range(query.first, query.first + query.count))
        # Node 63 is the sign bit of an int64.
        ancestors.extend(
            [0] * query.count if query.tree is None else [bits - (bits >> 63 << 64) for bits in query.tree]
        )
    return RowValues(sequences, row_slots, ancestors)


def _visible_tiles(query: Query, window: int, keys: int, offset: int, count: int) -> list[Range]:
    """Give the tiles of which at least one of `count` rows from `offset` sees a key: disjoint ranges, ascending."""
    mask = query.mask
    oldest = query.first + offset
    begin, end = mask.kv_begin, min(mask.kv_len, mask.tail_begin, oldest + count)
    spans = [(begin, end)]
    if window and oldest - window >= begin:
        spans = [(begin, min(mask.sink_end, end)), (oldest - window + 1, end)]
    ranges: list[Range] = []
    for first, last in spans:
        if first < last:
            _append(ranges, first // keys, (last - 1) // keys + 1)
    if query.tree is not None:
        for tile in _visible_tail_tiles(mask, query.tree[offset : offset + count], keys):
            _append(ranges, tile, tile + 1)
    return ranges


def _visible_tail_tiles(mask: MaskDescriptor, tree: Sequence[int], keys: int) -> Iterator[int]:
    union = 0
    for bits in tree:
        union |= bits
    begin = max(mask.kv_begin, mask.tail_begin)
    for tile in range(begin // keys, -(-mask.kv_len // keys)):
        first, last = max(begin, tile * keys), min(mask.kv_len, (tile + 1) * keys)
        if first < last and union >> (first - mask.tail_begin) & ((1 << (last - first)) - 1):
            yield tile


def _append(ranges: list[Range], first: int, end: int) -> None:
    """Add a range that starts at or after the last one's start; ranges that touch become one."""
    if ranges and first <= ranges[-1][1]:
        ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
    else:
        ranges.append((first, end))


def _cut(ranges: list[Range], chunk: int) -> list[Range]:
    """Cut ranges of tiles at multiples of `chunk` tiles."""
    return [
        (max(first, cut), min(end, cut + chunk))
        for first, end in ranges
        for cut in range(first // chunk * chunk, end, chunk)
    ]


def _pack(pieces: list[Range], chunk: int) -> list[tuple[int, int, int, int]]:
    """Make work items of one or two pieces: two neighbours share an item where both fit into a chunk's worth."""
    work: list[tuple[int, int, int, int]] = []
    waiting: Range | None = None
    for piece in pieces:
        if waiting is None:
            waiting = piece
        elif waiting[1] - waiting[0] + piece[1] - piece[0] <= chunk:
            work.append((*waiting, *piece))
            waiting = None
        else:
            work.append((0, 0, *waiting))
            waiting = piece
    if waiting is not None or not work:
        # A query tile that sees nothing still has an item, which writes zeros.
        work.append((0, 0, *(waiting or (0, 0))))
    return work
