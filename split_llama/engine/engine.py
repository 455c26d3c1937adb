"""The engine: one segment, its KV pages and an attention backend. Segments A, B and C all run on it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from split_llama.config import BlockRange
from split_llama.engine.attention import Attention, TorchAttention
from split_llama.engine.kv_cache import KVCache, Order
from split_llama.engine.low_rank import NO_ADAPTER, AdapterBank
from split_llama.engine.pages import PagePool
from split_llama.engine.plan import BatchPlan, SequenceRun, Stage
from split_llama.engine.sequence import Sequence
from split_llama.errors import PartitionNotAllowed
from split_llama.layers import Segment

PAGE_SIZE = 16


class Executor(Protocol):
    """The seam between planning and computing: immutable plans in, outputs out, nothing shared."""

    def run(self, plan: BatchPlan, states: Tensor) -> Tensor:
        """Run one pass: `states [rows, hidden]` to outputs of the same shape. Blocking; one call at a time."""
        ...


class SegmentExecutor:
    """Runs plans over a segment and its cache in this process."""

    def __init__(
        self, segment: Segment, cache: KVCache, attention: Attention, adapters: AdapterBank | None = None
    ) -> None:
        self._segment = segment
        self._cache = cache
        self._attention = attention
        self._adapters = adapters

    @torch.inference_mode()
    def run(self, plan: BatchPlan, states: Tensor) -> Tensor:
        """Apply the plan's cache edits, then run its rows stage by stage; see `Executor.run`."""
        assert states.shape == (plan.num_rows, self._segment.config.hidden_size), "plan and states disagree"
        self._cache.apply(plan.edits)
        stages = plan.stages()
        if len(stages) == 1:
            return self._run_stage(stages[0], plan.runs, states)
        states = states.clone()
        ranges = plan.row_ranges()
        for stage in stages:
            rows = torch.tensor([row for i in stage.runs for row in ranges[i]], device=states.device)
            runs = [plan.runs[i] for i in stage.runs]
            states[rows] = self._run_stage(stage, runs, states[rows])
        return states

    def _run_stage(self, stage: Stage, runs: Iterable[SequenceRun], states: Tensor) -> Tensor:
        runs = list(runs)
        positions = torch.tensor([p for run in runs for p in run.rotary_positions()], device=states.device)
        windows = self._segment.config.sliding_windows
        attend = self._attention.plan(runs, self._cache, windows)
        with self._adapted(stage.blocks, runs):
            out: Tensor = self._segment(stage.blocks, states, positions, attend)
        return out

    def _adapted(self, blocks: BlockRange, runs: list[SequenceRun]) -> AbstractContextManager[None]:
        if self._adapters is None or all(run.adapter == NO_ADAPTER for run in runs):
            return nullcontext()
        return self._adapters.over(blocks, [run.adapter for run in runs for _ in range(run.count)])


class Engine:
    """Owns a segment's pages and plans passes over them.

    Sequences and `plan` belong to one owner (an event loop, or one thread); `run` may be called from one other thread.
    """

    def __init__(
        self,
        segment: Segment,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        attention: Attention | None = None,
        kv_dtype: torch.dtype | None = None,
        swap_pages: int = 0,
        kv_order: Order = Order.PAGES,
        adapters: AdapterBank | None = None,
    ) -> None:
        self.segment = segment
        self.adapters = adapters
        self.pool = PagePool(num_pages, page_size, swap_pages)
        self.cache = KVCache(
            segment.config,
            segment.blocks,
            num_pages=num_pages,
            page_size=page_size,
            dtype=segment.dtype,
            device=segment.device,
            kv_dtype=kv_dtype,
            swap_pages=swap_pages,
            order=kv_order,
        )
        self.executor: Executor = SegmentExecutor(segment, self.cache, attention or TorchAttention(), adapters)

    @property
    def blocks(self) -> BlockRange:
        """The blocks hosted here."""
        return self.segment.blocks

    def sequence(self, blocks: BlockRange, max_length: int, adapter: int = NO_ADAPTER) -> Sequence:
        """Start an empty sequence over `blocks`, with an adapter of the engine's or none.

        Raises `PartitionNotAllowed` unless the blocks are hosted here.
        """
        assert adapter == NO_ADAPTER or (self.adapters is not None and 0 <= adapter < self.adapters.count)
        if not self.blocks.contains(blocks):
            raise PartitionNotAllowed(
                f"blocks {blocks} asked for, blocks {self.blocks} are hosted here; choose a partition inside them"
            )
        return Sequence(self.pool, blocks, max_length, adapter)

    def plan(self, runs: Iterable[SequenceRun]) -> BatchPlan:
        """Make the plan of one pass; plans must run in the order in which they were made.

        A pass applies all cache edits before it writes any row. So one pass may hold several runs of a sequence only
        when each simply appends to the one before; a rollback, an accept or a fork that builds on rows appended since
        the last plan needs a plan of its own in between.
        """
        return BatchPlan(tuple(runs), self.pool.take_edits())

    def run(self, plan: BatchPlan, states: Tensor) -> Tensor:
        """Run a plan; see `Executor.run`."""
        return self.executor.run(plan, states)
