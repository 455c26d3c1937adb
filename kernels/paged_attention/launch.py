"""Launches of the attention kernels: tiles by shape, scratch, and the two grids."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.paged_attention.kernel import attend, combine
from kernels.paged_attention.planner import (
    COMBINE_FIELDS,
    ITEM_FIELDS,
    SEQUENCE_FIELDS,
    AttentionPlan,
    Query,
    Tiles,
    row_values,
)
from kernels.runtime import interpreting, next_power_of_two

# Partial results that the combine kernel takes at once.
COMBINE_SLOTS = 16
NARROWEST_DIM = 16


class Launch(NamedTuple):
    """How a tile is run: warps of a program, and steps of the K and V pipeline."""

    num_warps: int
    num_stages: int


# For pages of 16 or 32 bits and heads up to 128 wide; a sweep on a device may overwrite entries.
LAUNCHES: dict[Tiles, Launch] = {
    Tiles(16, 32): Launch(8, 3),
    Tiles(16, 64): Launch(4, 3),
    Tiles(64, 32): Launch(4, 3),
    Tiles(128, 32): Launch(8, 3),
    Tiles(128, 64): Launch(8, 3),
}
# The same for wider heads and for 8-bit pages, whose tiles take more registers.
HEAVY_LAUNCHES: dict[Tiles, Launch] = LAUNCHES | {Tiles(16, 32): Launch(8, 4), Tiles(64, 32): Launch(8, 3)}
# For tiles that no query is given by its shape.
OTHER_LAUNCH = Launch(4, 3)


class PagedQuery(Query, Protocol):
    """A query that also knows its sequence's pages."""

    @property
    def block_table(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """A launch's integers on the device. Capacities may exceed what a plan needs: grids come from the shapes.

    `sequences` int32 `[S, 4]`: kv_begin, kv_len, sink_end, tail_begin. `block_tables` int32 `[S, max_pages]`.
    `row_slots` int32 `[N]`, `ancestors` int64 `[N]`. `items` int32 `[I, 8]`, padding -1. `combines` int32 `[C, 4]`,
    padding 0.
    """

    sequences: Tensor
    block_tables: Tensor
    row_slots: Tensor
    ancestors: Tensor
    items: Tensor
    combines: Tensor

    @classmethod
    def of(cls, queries: Sequence[PagedQuery], plan: AttentionPlan, device: torch.device) -> AttentionInputs:
        """Put a plan and its queries on a device, at the sizes that they have."""
        rows = row_values(queries)
        pages = max((len(query.block_table) for query in queries), default=0)
        tables = array("i")
        for query in queries:
            tables.extend((*query.block_table, *[0] * (pages - len(query.block_table))))
        return cls(
            sequences=_tensor(rows.sequences, SEQUENCE_FIELDS, torch.int32, device),
            block_tables=_tensor(tables, pages, torch.int32, device),
            row_slots=_tensor(rows.row_slots, 0, torch.int32, device),
            ancestors=_tensor(rows.ancestors, 0, torch.int64, device),
            items=_tensor(plan.items, ITEM_FIELDS, torch.int32, device),
            combines=_tensor(plan.combines, COMBINE_FIELDS, torch.int32, device),
        )


@dataclass(frozen=True, slots=True)
class Scratch:
    """Partial results of split queries: `out` float32 `[slots, G, M, K]`, `lse` float32 `[slots, G, M]`, base 2."""

    out: Tensor
    lse: Tensor

    @classmethod
    def allocate(cls, slots: int, *, kv_heads: int, rows: int, head_dim: int, device: torch.device) -> Scratch:
        """Make room for `slots` (a plan's `num_slots`, or a capacity) of `rows` (a tile's) packed rows."""
        return cls(
            out=torch.empty(slots, kv_heads, rows, head_dim, dtype=torch.float32, device=device),
            lse=torch.empty(slots, kv_heads, rows, dtype=torch.float32, device=device),
        )


def tiles_for(rows: int, *, group: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> Tiles:
    """Choose the tiles of a query of `rows` rows, by its own shape alone; each choice is a class, and a launch.

    `dtype` is q's type, `kv_dtype` the pages'. Few packed rows are bound by memory: a small query tile, and as many
    keys as keep enough bytes in flight. A draft tree's rows share one larger query tile, so that K and V are read
    once. A prompt's chunk is bound by arithmetic. Products in float32 take the registers of all larger tiles.
    """
    packed = rows * group
    narrow = head_dim <= 128
    plain = narrow and kv_dtype.itemsize == 2
    if dtype.itemsize == 4:
        return Tiles(max(16, next_power_of_two(group)), 32 if narrow else 16)
    if packed <= 16:
        return Tiles(16, 64 if plain else 32)
    if (packed <= 64 or not plain) and group <= 64:
        return Tiles(64, 32)
    return Tiles(128, 64 if plain else 32)


def launch_for(tiles: Tiles, kv: KVPages) -> Launch:
    """Look up how a tile is run over these pages."""
    return (HEAVY_LAUNCHES if kv.quantised or kv.head_dim > 128 else LAUNCHES).get(tiles, OTHER_LAUNCH)


def paged_attention(
    q_NHK: Tensor,
    kv: KVPages,
    inputs: AttentionInputs,
    *,
    window: int,
    tiles: Tiles,
    scale: float,
    scratch: Scratch,
    out_NHK: Tensor,
    launch: Launch | None = None,
) -> None:
    """Write each planned row's attention over its own sequence to `out_NHK`; other rows are left alone.

    `q_NHK` and `out_NHK` are contiguous, of one 16- or 32-bit float type. `inputs` holds a plan for this `window` and
    these `tiles`. A row that sees nothing gets zeros. Keys that no row of an item sees are not read. `launch`
    overrides the table.
    """
    _, heads, head_dim = q_NHK.shape
    assert q_NHK.is_contiguous()
    assert out_NHK.is_contiguous()
    assert out_NHK.shape == q_NHK.shape
    assert head_dim == kv.head_dim
    assert scratch.out.shape[1:] == (kv.kv_heads, tiles.rows, head_dim)
    geometry = {
        "GROUP": heads // kv.kv_heads,
        "KV_HEADS": kv.kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(next_power_of_two(head_dim), NARROWEST_DIM),
        "TILE_M": tiles.rows,
    }
    num_warps, num_stages = launch or launch_for(tiles, kv)
    num_items, num_combines = inputs.items.shape[0], inputs.combines.shape[0]
    if num_items:
        attend[(num_items * kv.kv_heads,)](
            q_NHK,
            _loadable(kv.k),
            _loadable(kv.v),
            kv.k_scale,
            kv.v_scale,
            out_NHK,
            scratch.out,
            scratch.lse,
            inputs.items,
            inputs.sequences,
            inputs.block_tables,
            inputs.row_slots,
            inputs.ancestors,
            inputs.block_tables.shape[1],
            scale * math.log2(math.e),
            WINDOW=window,
            PAGE_SIZE=kv.page_size,
            TILE_T=tiles.keys,
            UPCAST=interpreting(),
            **geometry,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
        )
    if num_combines:
        combine[(num_combines, kv.kv_heads, tiles.rows)](
            out_NHK, scratch.out, scratch.lse, inputs.combines, **geometry, SLOTS=COMBINE_SLOTS, enable_fp_fusion=True
        )


def _loadable(pages: Tensor) -> Tensor:
    """Give pages in a type that the device can load: fp8 as bytes where its compiler knows no float8_e4m3fn."""
    known = pages.dtype != torch.float8_e4m3fn or (
        pages.is_cuda and torch.cuda.get_device_capability(pages.device) >= (8, 9)
    )
    return pages if known else pages.view(torch.uint8)


def _tensor(values: array[int], fields: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy an array to the device, as rows of `fields` unless that is 0."""
    flat = torch.frombuffer(values, dtype=dtype).clone() if len(values) else torch.empty(0, dtype=dtype)
    return (flat.view(-1, fields) if fields else flat).to(device)
