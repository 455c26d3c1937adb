"""The planner against brute force: what it lists is what a row may see, and no more."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.limits import MAX_GROUP, MAX_HEAD_DIM, unsupported
from kernels.paged_attention import planner
from kernels.paged_attention.launch import tiles_for
from kernels.paged_attention.planner import Tiles, chunk_slots, plan_attention, row_values
from split_llama.mask import MAX_TREE_NODES, MaskDescriptor, is_visible
from tests.kernels.attention_cases import FAMILIES, Run, decode, prefill_chunk

SMALL_CHUNK = 128


def rows_of(values: array[int], fields: int) -> list[tuple[int, ...]]:
    return [tuple(values[at : at + fields]) for at in range(0, len(values), fields)]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Any run that the engine could plan, and trees with any ancestor bits."""
    length = draw(st.integers(1, 420))
    kv_begin = draw(st.one_of(st.just(0), st.integers(0, length)))
    sink_end = draw(st.sampled_from([0, 0, 1, 4, 40, 200]))
    if draw(st.booleans()):
        nodes = draw(st.integers(1, MAX_TREE_NODES))
        bits = st.integers(0, 2**nodes - 1)
        tree = tuple(draw(st.lists(st.one_of(bits, st.just(1)), min_size=nodes, max_size=nodes)))
        mask = MaskDescriptor(length + nodes, min(kv_begin, length), sink_end, tail_begin=length)
        return Run(mask, length, nodes, tree)
    count = draw(st.integers(1, min(length, 30)))
    return Run(MaskDescriptor(length, kv_begin, sink_end), length - count, count)


def visible_tiles(run: Run, window: int, rows: range, keys: int) -> list[int]:
    """The tiles of which a row of `rows` (of the run) sees a key, by asking for every key."""
    seen = {
        key // keys
        for row in rows
        for key in range(run.mask.kv_len)
        if is_visible(run.mask, window, run.first + row, run.tree[row] if run.tree else 0, key)
    }
    return sorted(seen)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(runs(), max_size=3),
    st.sampled_from([0, 0, 1, 5, 30, 130]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([(16, 1), (16, 3), (16, 16), (64, 4)]),
)
def test_listed_tiles_are_the_visible_ones(batch: list[Run], window: int, keys: int, shape: tuple[int, int]) -> None:
    rows_packed, group = shape
    with mock.patch.object(planner, "CHUNK", SMALL_CHUNK):
        plan = plan_attention(batch, window=window, tiles=Tiles(rows_packed, keys), group=group)
        items, combines = rows_of(plan.items, 8), rows_of(plan.combines, 4)
        begin, taken = 0, 0
        for index, run in enumerate(batch):
            query_tiles = -(-run.count // (rows_packed // group))
            for first in range(0, run.count, rows_packed // group):
                count = min(rows_packed // group, run.count - first)
                mine = [item for item in items if item[:3] == (index, begin + first, count)]
                taken += len(mine)
                check_query_tile(mine, combines, chunk_slots(query_tiles) // keys)
                listed = [tile for item in mine for pair in (item[3:5], item[5:7]) for tile in range(*pair)]
                assert listed == visible_tiles(run, window, range(first, first + count), keys)
            begin += run.count
    assert taken == len(items)
    used = sorted(slot for _, _, first, slots in combines for slot in range(first, first + slots))
    assert used == list(range(plan.num_slots))


def check_query_tile(items: Sequence[tuple[int, ...]], combines: Sequence[tuple[int, ...]], chunk: int) -> None:
    """An item reads at most a chunk, in ranges that cross no chunk's end; several items have a combine."""
    assert items
    for _, _, _, *ranges, _ in items:
        assert ranges[1] - ranges[0] + ranges[3] - ranges[2] <= chunk
        assert all(begin // chunk == (end - 1) // chunk for begin, end in (ranges[:2], ranges[2:]) if begin < end)
    slots = [item[7] for item in items]
    if len(items) == 1:
        assert slots == [planner.WRITES_OUTPUT]
    else:
        assert slots == list(range(slots[0], slots[0] + len(slots)))
        assert (items[0][1], items[0][2], slots[0], len(slots)) in combines


def test_a_plan_is_the_same_alone_and_in_a_batch() -> None:
    batch = [run(length) for _, run in FAMILIES.values() for length in (3, 700, 2100)]
    together = plan_attention(batch, window=900, tiles=Tiles(16, 64), group=4)
    row = slot = 0
    alone: list[tuple[int, ...]] = []
    for index, run in enumerate(batch):
        plan = plan_attention([run], window=900, tiles=Tiles(16, 64), group=4)
        for _, begin, *rest, out in rows_of(plan.items, 8):
            alone.append((index, begin + row, *rest, out if out < 0 else out + slot))
        row += run.count
        slot += plan.num_slots
    assert rows_of(together.items, 8) == alone


def test_members_keep_their_rows() -> None:
    batch = [decode(40), prefill_chunk(40), decode(50)]
    plan = plan_attention(batch, window=0, tiles=Tiles(16, 64), group=1, members={1})
    assert [item[:3] for item in rows_of(plan.items, 8)] == [(1, 1, 13)]


def test_a_long_decode_is_cut_at_multiples_of_512() -> None:
    plan = plan_attention([decode(1300)], window=0, tiles=Tiles(16, 64), group=4)
    assert [item[3:] for item in rows_of(plan.items, 8)] == [(0, 0, 0, 8, 0), (0, 0, 8, 16, 1), (0, 0, 16, 21, 2)]
    assert rows_of(plan.combines, 4) == [(0, 1, 0, 3)]


def test_sinks_and_a_short_window_share_an_item() -> None:
    run = Run(MaskDescriptor(1000, sink_end=4), 999)
    plan = plan_attention([run], window=100, tiles=Tiles(16, 64), group=4)
    assert rows_of(plan.items, 8) == [(0, 0, 1, 0, 1, 14, 16, planner.WRITES_OUTPUT)]


def test_a_whole_prompt_is_not_cut_and_starts_with_its_longest_items() -> None:
    plan = plan_attention([Run(MaskDescriptor(2048), 0, 2048)], window=0, tiles=Tiles(128, 64), group=4)
    ends = [item[6] for item in rows_of(plan.items, 8)]
    assert plan.num_slots == 0
    assert ends == sorted(ends, reverse=True)


def test_row_values() -> None:
    run = Run(MaskDescriptor(74, 2, 3, tail_begin=10), 10, 64, tuple(1 << node for node in range(64)))
    values = row_values([decode(9), run])
    assert rows_of(values.sequences, 4) == [(0, 9, 0, 2**31 - 1), (2, 74, 3, 10)]
    assert list(values.row_slots) == [8, *range(10, 74)]
    # Bit 63 is an int64's sign.
    assert list(values.ancestors) == [0, *(1 << node for node in range(63)), -(2**63)]


@pytest.mark.parametrize(
    ("rows", "group", "dtype", "tiles"),
    [
        (1, 4, torch.bfloat16, Tiles(16, 64)),
        (9, 1, torch.bfloat16, Tiles(16, 64)),
        (9, 4, torch.bfloat16, Tiles(64, 32)),
        (512, 4, torch.bfloat16, Tiles(128, 64)),
        (512, 4, torch.float32, Tiles(16, 32)),
    ],
)
def test_tiles_follow_from_the_shape(rows: int, group: int, dtype: torch.dtype, tiles: Tiles) -> None:
    assert tiles_for(rows, group=group, head_dim=128, dtype=dtype, kv_dtype=dtype) == tiles


@pytest.mark.parametrize("group", [1, 4, 7, 16, 64, 71, MAX_GROUP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [8, 80, 128, MAX_HEAD_DIM])
def test_a_query_tile_has_room_for_a_group(
    group: int, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int
) -> None:
    for rows in (1, 8, 64, 8192):
        tiles = tiles_for(rows, group=group, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
        assert tiles.rows >= group
        assert planner.CHUNK % tiles.keys == 0


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"head_dim": 257}, "head_dim 1 to 256"),
        ({"head_dim": 0}, "head_dim 1 to 256"),
        ({"page_size": 24}, "page sizes"),
        ({"page_size": 512}, "page sizes"),
        ({"group": 129}, "query heads"),
        ({"tree_nodes": 65}, "at most 64 nodes"),
    ],
)
def test_limits_are_named(broken: dict[str, int], named: str) -> None:
    fine = {"head_dim": 128, "page_size": 16}
    assert unsupported(**fine) is None
    assert named in (unsupported(**{**fine, **broken}) or "")
