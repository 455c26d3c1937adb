"""One pass on the device: cache edits, then the rows through the blocks, by a graph or stage by stage."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.frame_codec.kernel import decode_rows
from kernels.kv_pages import KVPages
from serving.device.adapters import DeviceAdapters
from serving.device.blocks import run_blocks
from serving.device.device import Device, make_device
from serving.device.edits import apply_edits, warm_up_edits
from serving.device.graphs import Graphs, Most
from serving.device.inputs import (
    TABLE_STEP,
    Capacity,
    Geometry,
    HostInputs,
    LaunchCapacity,
    block_inputs,
    fields,
    fill,
    host_inputs,
)
from serving.device.memory import HostArena, Packing, upload
from serving.device.staging import RowSource
from split_llama.config import BlockRange
from split_llama.engine.kv_cache import KVCache
from split_llama.engine.low_rank import AdapterBank
from split_llama.engine.plan import BatchPlan, SequenceRun, Stage
from split_llama.layers import Segment

# Longer runs take the tiles of this one.
PREFILL_ROWS = 128


def pages_of(cache: KVCache) -> list[KVPages]:
    """Give a cache's pages block by block, as the kernels take them."""
    if cache.k_scale is not None and cache.v_scale is not None:
        return [KVPages(*parts) for parts in zip(cache.k, cache.v, cache.k_scale, cache.v_scale, strict=True)]
    return [KVPages(k, v) for k, v in zip(cache.k, cache.v, strict=True)]


class Runner:
    """Queues passes over a segment and its cache. One thread at a time; nothing here waits for the device.

    Whatever it copies from the host lies in the arena of the pass, which must not be reset before the pass is done.
    """

    def __init__(
        self,
        segment: Segment,
        cache: KVCache,
        most: Most,
        *,
        adapters: AdapterBank | None = None,
        device: Device | None = None,
        graphs: bool = True,
    ) -> None:
        self.segment = segment
        self.device = device or make_device(segment.device)
        self._cache = cache
        self._pages = pages_of(cache)
        self._adapters = None if adapters is None else DeviceAdapters(adapters)
        self._geometry = Geometry.of(segment, self._pages[0])
        with self.device.entered():
            self.graphs = (
                Graphs(segment, self._pages, self._geometry, self.device, most, self._adapters) if graphs else None
            )

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.segment.config.hidden_size

    @torch.inference_mode()
    def run(self, plan: BatchPlan, rows: RowSource | Tensor, arena: HostArena) -> Tensor:
        """Queue a pass: `rows` are encoded on the host, or states `[N, D]`; gives outputs `[N, D]` on the device.

        The outputs must be used, in the device's queue, before the next pass.
        """
        apply_edits(plan.edits, self._cache, arena, self.device)
        blocks = self.segment.blocks
        if self.graphs is not None and self.graphs.serves(plan.runs):
            inputs = host_inputs(plan.runs, blocks, self._geometry)
            outputs = self.graphs.run(inputs, rows, arena)
            if outputs is not None:
                return outputs
        stages = plan.stages()
        states = self._states(rows, arena)
        if len(stages) == 1:
            return self._run_stage(stages[0].blocks, plan.runs, states, arena)
        ranges = plan.row_ranges()
        for stage in stages:
            self._run_part(stage, plan, ranges, states, arena)
        return states

    def _states(self, rows: RowSource | Tensor, arena: HostArena) -> Tensor:
        on = self.device.torch_device
        if isinstance(rows, Tensor):
            return rows.to(device=on, dtype=self.segment.dtype, copy=True)
        payload = torch.empty(len(rows.payload), dtype=torch.uint8, device=on)
        payload.copy_(rows.payload, non_blocking=True)
        places = upload({"offsets": rows.offsets, "codecs": rows.codecs}, arena, self.device)
        states = torch.empty((len(rows.offsets), self.width), dtype=self.segment.dtype, device=on)
        decode_rows(payload, places["offsets"], places["codecs"], states, aligned=self.width % 2 == 0)
        return states

    def _run_part(self, stage: Stage, plan: BatchPlan, ranges: list[range], states: Tensor, arena: HostArena) -> None:
        """Run a stage in which only some runs take part, in place."""
        chosen = np.array([row for index in stage.runs for row in ranges[index]], np.int64)
        rows = upload({"rows": chosen}, arena, self.device)["rows"]
        runs = [plan.runs[index] for index in stage.runs]
        outputs = self._run_stage(stage.blocks, runs, states.index_select(0, rows), arena)
        states.index_copy_(0, rows, outputs)

    def _run_stage(
        self, span: BlockRange, runs: tuple[SequenceRun, ...] | list[SequenceRun], states: Tensor, arena: HostArena
    ) -> Tensor:
        inputs = host_inputs(runs, span, self._geometry)
        return self._run_eagerly(span, inputs.needs, inputs, states, arena)

    def _run_eagerly(
        self, span: BlockRange, capacity: Capacity, inputs: HostInputs | None, states: Tensor, arena: HostArena
    ) -> Tensor:
        packing = Packing(fields(capacity, span, self._geometry))
        host = arena.take(packing.size)
        fill(packing.arrays(host), inputs, None)
        buffer = torch.empty(packing.size, dtype=torch.uint8, device=self.device.torch_device)
        buffer.copy_(host, non_blocking=True)
        placed = block_inputs(packing.tensors(buffer), capacity, span, self._geometry)
        return run_blocks(self.segment, span, states, placed, self._pages, self._adapters)

    @torch.inference_mode()
    def warm_up(self, seconds: float) -> None:
        """Compile what prompts need and capture what decoding needs, on padding: so the first sessions do not wait."""
        arena = HostArena(self.device)
        with self.device.entered():
            warm_up_edits(self._cache, arena, self.device)
            self._run_padding(arena)
            self.device.mark().wait()
            if self.graphs is not None:
                self.graphs.warm_up(seconds, arena)
            self.device.mark().wait()

    def _run_padding(self, arena: HostArena) -> None:
        """Run rows that are all padding, with every class of launches that runs of any length call for."""
        classes = {self._geometry.tiles(count) for count in range(1, PREFILL_ROWS + 1)}
        launches = tuple(LaunchCapacity(tiles, items=2, slots=2) for tiles in classes)
        capacity = Capacity(PREFILL_ROWS, 1, TABLE_STEP, launches, mixed=False, adapted=self._adapters is not None)
        shape = (PREFILL_ROWS, self.width)
        states = torch.zeros(shape, dtype=self.segment.dtype, device=self.device.torch_device)
        self._run_eagerly(self.segment.blocks, capacity, None, states, arena)
