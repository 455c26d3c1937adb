"""The integers of a pass: from a plan's runs to arrays on the host, and from those to what the blocks take.

Runs whose shapes call for the same tiles share a launch of attention; there is one plan per distinct window. All
arrays travel in one buffer (`serving.device.memory.Packing`), at their own sizes or padded to a graph's capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.paged_attention.launch import AttentionInputs, Scratch, tiles_for
from kernels.paged_attention.planner import (
    COMBINE_FIELDS,
    ITEM_FIELDS,
    SEQUENCE_FIELDS,
    AttentionPlan,
    Tiles,
    plan_attention,
    row_values,
)
from serving.device.blocks import AttentionLaunch, BlockInputs
from serving.device.memory import Field
from serving.device.staging import RowSource
from split_llama.config import BlockRange
from split_llama.engine.low_rank import NO_ADAPTER
from split_llama.engine.plan import SequenceRun
from split_llama.layers import Segment

Integers = npt.NDArray[Any]
# A table's width is a number in the launch: multiples of 16 compile to one kernel.
TABLE_STEP = 16
# What padding means: a row that is not stored, not decoded and not adapted, an item that does nothing.
PADDING = {"slots": -1, "codecs": -1, "items": -1, "adapters": -1}


@dataclass(frozen=True, slots=True)
class Geometry:
    """What of model and cache shapes the inputs.

    `windows` are those of the whole model's blocks, `dtype` is the type of states, `storage` that of K and V.
    """

    windows: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    storage: torch.dtype

    @classmethod
    def of(cls, segment: Segment, pages: KVPages) -> Geometry:
        """Take it from a segment and one block's pages."""
        config = segment.config
        return cls(
            config.sliding_windows,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            pages.page_size,
            segment.dtype,
            pages.k.dtype,
        )

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def tiles(self, count: int) -> Tiles:
        """Choose the tiles of a run of `count` rows, by its own shape alone."""
        return tiles_for(count, group=self.group, head_dim=self.head_dim, dtype=self.dtype, kv_dtype=self.storage)


@dataclass(frozen=True, slots=True)
class LaunchCapacity:
    """The work items of a class of launches, and the slots of scratch that they write to."""

    tiles: Tiles
    items: int
    slots: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """The sizes of a pass's arrays: rows, sequences, pages of a table, and what each class of launches takes.

    `mixed` says that rows may pass by blocks, and that an array says which; `adapted` that rows may have adapters.
    """

    rows: int
    sequences: int
    pages: int
    launches: tuple[LaunchCapacity, ...]
    mixed: bool
    adapted: bool = False

    def combines(self, launch: LaunchCapacity) -> int:
        """Give the most combines that a launch can have: each joins two slots at least and serves rows of its own."""
        return min(launch.slots // 2, self.rows)


@dataclass(frozen=True, slots=True)
class HostInputs:
    """A pass's integers on the host.

    `positions` int32, `slots` int64, `row_slots` int32, `ancestors` int64 `[N]`; `sequences` int32 `[S, 4]`; `tables`,
    one per run; `plans` by window and tiles; `passes_by` bool `[blocks, N, 1]`, or `None` where no row does; `adapters`
    int32 `[N]`, or `None` where no row has one.
    """

    positions: Integers
    slots: Integers
    row_slots: Integers
    ancestors: Integers
    sequences: Integers
    tables: Integers
    plans: Mapping[tuple[int, Tiles], AttentionPlan]
    passes_by: Integers | None
    adapters: Integers | None

    @property
    def needs(self) -> Capacity:
        """The least capacity that holds this."""
        launches: dict[Tiles, LaunchCapacity] = {}
        for (_, tiles), plan in self.plans.items():
            least = launches.get(tiles, LaunchCapacity(tiles, 0, 0))
            items, slots = max(least.items, len(plan.items) // ITEM_FIELDS), max(least.slots, plan.num_slots)
            launches[tiles] = LaunchCapacity(tiles, items, slots)
        return Capacity(
            rows=len(self.positions),
            sequences=len(self.sequences),
            pages=self.tables.shape[1],
            launches=tuple(sorted(launches.values(), key=lambda launch: (launch.tiles.rows, launch.tiles.keys))),
            mixed=self.passes_by is not None,
            adapted=self.adapters is not None,
        )


def host_inputs(runs: Sequence[SequenceRun], span: BlockRange, geometry: Geometry) -> HostInputs:
    """List the integers of a pass of `runs` through the blocks of `span`."""
    values = row_values(runs)
    counts = [run.count for run in runs]
    row_slots = np.frombuffer(values.row_slots, np.int32)
    tables = _tables(runs)
    of_run = np.repeat(np.arange(len(runs)), counts)
    pages = tables[of_run, row_slots // geometry.page_size].astype(np.int64)
    return HostInputs(
        positions=_positions(runs, row_slots, counts),
        slots=pages * geometry.page_size + row_slots % geometry.page_size,
        row_slots=row_slots,
        ancestors=np.frombuffer(values.ancestors, np.int64),
        sequences=np.frombuffer(values.sequences, np.int32).reshape(-1, SEQUENCE_FIELDS),
        tables=tables,
        plans=_plans(runs, span, geometry),
        passes_by=_passes_by(runs, span, counts),
        adapters=_adapters(runs, counts),
    )


def _tables(runs: Sequence[SequenceRun]) -> Integers:
    longest = max((len(run.block_table) for run in runs), default=0)
    width = max(TABLE_STEP, -(-longest // TABLE_STEP) * TABLE_STEP)
    tables = np.zeros((len(runs), width), np.int32)
    for table, run in zip(tables, runs, strict=True):
        table[: len(run.block_table)] = run.block_table
    return tables


def _positions(runs: Sequence[SequenceRun], row_slots: Integers, counts: Sequence[int]) -> Integers:
    positions: Integers = row_slots + np.repeat(np.array([run.mask.rope_offset for run in runs], np.int32), counts)
    start = 0
    for run in runs:
        if run.tree is not None:
            positions[start : start + run.count] = list(run.rotary_positions())
        start += run.count
    return positions


def _plans(runs: Sequence[SequenceRun], span: BlockRange, geometry: Geometry) -> dict[tuple[int, Tiles], AttentionPlan]:
    members: dict[Tiles, set[int]] = {}
    for index, run in enumerate(runs):
        members.setdefault(geometry.tiles(run.count), set()).add(index)
    return {
        (window, tiles): plan_attention(
            runs, window=window, tiles=tiles, group=geometry.group, members=None if len(members) == 1 else indices
        )
        for window in sorted(set(geometry.windows[span.start : span.stop]))
        for tiles, indices in members.items()
    }


def _passes_by(runs: Sequence[SequenceRun], span: BlockRange, counts: Sequence[int]) -> Integers | None:
    if all(run.blocks.contains(span) for run in runs):
        return None
    starts = np.repeat(np.array([run.blocks.start for run in runs]), counts)
    stops = np.repeat(np.array([run.blocks.stop for run in runs]), counts)
    blocks = np.arange(span.start, span.stop)[:, None]
    passes_by: Integers = ((blocks < starts) | (blocks >= stops))[:, :, None]
    return passes_by


def _adapters(runs: Sequence[SequenceRun], counts: Sequence[int]) -> Integers | None:
    if all(run.adapter == NO_ADAPTER for run in runs):
        return None
    adapters: Integers = np.repeat(np.array([run.adapter for run in runs], np.int32), counts)
    return adapters


def fields(capacity: Capacity, span: BlockRange, geometry: Geometry) -> list[Field]:
    """List the arrays of a pass of this capacity; `offsets` and `codecs` are those of the rows' payloads."""
    rows, sequences = capacity.rows, capacity.sequences
    listed = [
        Field("positions", "int32", (rows,)),
        Field("slots", "int64", (rows,)),
        Field("row_slots", "int32", (rows,)),
        Field("ancestors", "int64", (rows,)),
        Field("offsets", "int64", (rows,)),
        Field("codecs", "int32", (rows,)),
        Field("sequences", "int32", (sequences, SEQUENCE_FIELDS)),
        Field("tables", "int32", (sequences, capacity.pages)),
    ]
    for window in sorted(set(geometry.windows[span.start : span.stop])):
        for launch in capacity.launches:
            name = launch_name(window, launch.tiles)
            listed.append(Field(f"items.{name}", "int32", (launch.items, ITEM_FIELDS)))
            listed.append(Field(f"combines.{name}", "int32", (capacity.combines(launch), COMBINE_FIELDS)))
    if capacity.mixed:
        listed.append(Field("passes_by", "bool", (len(span), rows, 1)))
    if capacity.adapted:
        listed.append(Field("adapters", "int32", (rows,)))
    return listed


def launch_name(window: int, tiles: Tiles) -> str:
    """Name a launch's arrays."""
    return f"{window}.{tiles.rows}.{tiles.keys}"


def fill(arrays: Mapping[str, Integers], inputs: HostInputs | None, rows: RowSource | None) -> None:
    """Write a pass into arrays that may be larger; what is left over is padding. Without a pass all of it is."""
    given = {} if inputs is None else _by_name(inputs)
    if rows is not None:
        given |= {"offsets": rows.offsets, "codecs": rows.codecs}
    for name, array in arrays.items():
        array[...] = PADDING.get(name.partition(".")[0], 0)
        source = given.get(name)
        if source is not None:
            array[tuple(slice(size) for size in source.shape)] = source


def _by_name(inputs: HostInputs) -> dict[str, Integers]:
    given = {
        "positions": inputs.positions,
        "slots": inputs.slots,
        "row_slots": inputs.row_slots,
        "ancestors": inputs.ancestors,
        "sequences": inputs.sequences,
        "tables": inputs.tables,
    }
    for (window, tiles), plan in inputs.plans.items():
        name = launch_name(window, tiles)
        given[f"items.{name}"] = np.frombuffer(plan.items, np.int32).reshape(-1, ITEM_FIELDS)
        given[f"combines.{name}"] = np.frombuffer(plan.combines, np.int32).reshape(-1, COMBINE_FIELDS)
    if inputs.passes_by is not None:
        given["passes_by"] = inputs.passes_by
    if inputs.adapters is not None:
        given["adapters"] = inputs.adapters
    return given


def block_inputs(
    tensors: Mapping[str, Tensor], capacity: Capacity, span: BlockRange, geometry: Geometry
) -> BlockInputs:
    """Put a pass's arrays on the device into the blocks' terms; scratch memory is allocated here."""
    windows = sorted(set(geometry.windows[span.start : span.stop]))
    device = tensors["slots"].device
    scratch = {launch.tiles: _scratch(launch, geometry, device) for launch in capacity.launches}
    return BlockInputs(
        positions=tensors["positions"],
        slots=tensors["slots"],
        launches={
            window: [
                AttentionLaunch(_attention_inputs(tensors, launch_name(window, tiles)), tiles, scratch[tiles])
                for tiles in scratch
            ]
            for window in windows
        },
        passes_by=tensors.get("passes_by"),
        adapters=tensors.get("adapters"),
    )


def _scratch(launch: LaunchCapacity, geometry: Geometry, device: torch.device) -> Scratch:
    # Windows and blocks come one after the other, so they share it.
    return Scratch.allocate(
        launch.slots, kv_heads=geometry.kv_heads, rows=launch.tiles.rows, head_dim=geometry.head_dim, device=device
    )


def _attention_inputs(tensors: Mapping[str, Tensor], name: str) -> AttentionInputs:
    return AttentionInputs(
        sequences=tensors["sequences"],
        block_tables=tensors["tables"],
        row_slots=tensors["row_slots"],
        ancestors=tensors["ancestors"],
        items=tensors[f"items.{name}"],
        combines=tensors[f"combines.{name}"],
    )
