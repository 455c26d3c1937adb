"""The `Attention` protocol of the engine, and its PyTorch backend.

A backend turns the runs of a stage into a `BlockAttention` for each distinct window, once per pass; the blocks then
call it with their rows. The backend reads K and V only where at least one of a run's queries may see them, so that
garbage in other slots, NaN included, cannot reach a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from split_llama.engine.kv_cache import KVCache
from split_llama.engine.plan import SequenceRun
from split_llama.layers import BlockAttention


class Attention(Protocol):
    """Plans attention over a stage's runs."""

    def plan(self, runs: Sequence[SequenceRun], cache: KVCache, windows: Sequence[int]) -> BlockAttention:
        """Prepare a stage. `windows[b]` is the window of block `b` of the whole model, 0 for none."""
        ...


class TorchAttention:
    """Attention in plain PyTorch, run by run: for CPUs, and the reference that kernels are compared with."""

    def plan(self, runs: Sequence[SequenceRun], cache: KVCache, windows: Sequence[int]) -> BlockAttention:
        """Prepare a stage: which cache slots each run reads, and the mask where not all of them are visible to all."""
        spans = [range(run.blocks.start, run.blocks.stop) for run in runs]
        used = {windows[block] for span in spans for block in span}
        return _PlannedAttention(
            cache=cache,
            windows=tuple(windows),
            rows=[run.count for run in runs],
            write_slots=torch.tensor(
                [slot for run in runs for slot in run.cache_slots(cache.page_size)], device=cache.k.device
            ),
            reads={window: [_plan_read(run, window, cache) for run in runs] for window in used},
        )


class _Read(Protocol):
    """What one run reads in a stage."""

    def attend(self, block: int, q_NHK: Tensor) -> Tensor:
        """Give the attention output `[N, H, K]` of the run's rows."""
        ...


@dataclass(frozen=True, slots=True)
class _MaskedRead:
    """A run's keys by their cache slots, and the mask `[rows, keys]` where not every row sees all of them."""

    cache: KVCache
    slots: slice | Tensor
    mask: Tensor | None

    def attend(self, block: int, q_NHK: Tensor) -> Tensor:
        k_SGK, v_SGK = self.cache.read(block, self.slots)
        return _attend(q_NHK, k_SGK, v_SGK, self.mask)


@dataclass(frozen=True, slots=True)
class _RowRead:
    """One row that sees all of its keys, which lie side by side: `[1, G, S, K]` views of every block, made once."""

    first_block: int
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    def attend(self, block: int, q_NHK: Tensor) -> Tensor:
        k, v = self.k[block - self.first_block], self.v[block - self.first_block]
        out: Tensor = F.scaled_dot_product_attention(q_NHK.view(1, k.shape[1], -1, k.shape[3]), k, v)
        return out.reshape(q_NHK.shape)


@dataclass(frozen=True, slots=True)
class _PlannedAttention:
    cache: KVCache
    windows: tuple[int, ...]
    rows: list[int]
    write_slots: Tensor
    reads: dict[int, list[_Read]]

    def __call__(self, block: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        self.cache.write(block, self.write_slots, k_NGK, v_NGK)
        reads = self.reads[self.windows[block]]
        if len(reads) == 1:
            return reads[0].attend(block, q_NHK)
        parts = torch.split(q_NHK, self.rows)
        return torch.cat([read.attend(block, part) for read, part in zip(reads, parts, strict=True)])


def _plan_read(run: SequenceRun, window: int, cache: KVCache) -> _Read:
    slots, mask = _visible_slots(run, window, cache.page_size, cache.k.device)
    if run.count == 1 and mask is None and cache.heads_first is not None and isinstance(slots, slice):
        k, v = (tensor[:, :, :, slots].unbind(0) for tensor in cache.heads_first)
        return _RowRead(cache.blocks.start, k, v)
    return _MaskedRead(cache, slots, mask)


def _visible_slots(
    run: SequenceRun, window: int, page_size: int, device: torch.device
) -> tuple[slice | Tensor, Tensor | None]:
    """Give the cache slots that any row of the run sees, and the mask over them; no mask where all rows see all."""
    mask = run.mask
    only_row_sees_all = run.count == 1 and run.tree is None and (window == 0 or window >= mask.kv_len)
    if only_row_sees_all:
        return _cache_slots(run, mask.kv_begin, mask.kv_len, page_size, device), None
    seen = _visible(run, window, device)
    keys = seen.any(dim=0).nonzero().flatten()
    first, end = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
    if len(keys) == end - first:
        return _cache_slots(run, mask.kv_begin + first, mask.kv_begin + end, page_size, device), seen[:, first:end]
    keys_slots = keys + mask.kv_begin
    table = torch.tensor(run.block_table, device=device)
    return table[keys_slots // page_size] * page_size + keys_slots % page_size, seen[:, keys]


def _visible(run: SequenceRun, window: int, device: torch.device) -> Tensor:
    """Evaluate the mask descriptor for the run's rows and the keys `[kv_begin, kv_len)`: bool `[rows, keys]`."""
    mask = run.mask
    keys = torch.arange(mask.kv_begin, mask.kv_len, device=device)
    queries = torch.arange(run.first, run.first + run.count, device=device)[:, None]
    seen = keys <= queries
    if window:
        seen &= (keys < mask.sink_end) | (keys > queries - window)
    if run.tree is not None:
        nodes = torch.tensor([[bits >> node & 1 for node in range(len(run.tree))] for bits in run.tree], device=device)
        seen[:, mask.tail_begin - mask.kv_begin :] = nodes.bool()
    return seen


def _cache_slots(run: SequenceRun, first: int, end: int, page_size: int, device: torch.device) -> slice | Tensor:
    """Index the cache slots of positions `[first, end)`; consecutive pages give a slice, which copies nothing."""
    start, stop = first // page_size, -(-end // page_size)
    pages = run.block_table[start:stop]
    offset = first - start * page_size
    if not pages or pages == tuple(range(pages[0], pages[0] + len(pages))):
        base = pages[0] * page_size + offset if pages else 0
        return slice(base, base + end - first)
    slots = torch.tensor(pages, device=device)[:, None] * page_size + torch.arange(page_size, device=device)
    return slots.flatten()[offset : offset + end - first]


def _attend(q_NHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask_NS: Tensor | None) -> Tensor:
    """Attention of one run's rows over S keys; the query heads of one key head are packed with the rows."""
    rows, heads, width = q_NHK.shape
    groups = k_SGK.shape[1]
    packed = q_NHK.view(rows, groups, heads // groups, width).permute(1, 2, 0, 3).flatten(1, 2)
    bias = None if mask_NS is None else mask_NS.repeat(heads // groups, 1)
    out = F.scaled_dot_product_attention(
        packed[None], k_SGK.transpose(0, 1)[None], v_SGK.transpose(0, 1)[None], attn_mask=bias
    )[0]
    if mask_NS is not None:
        # A row that sees nothing gives zeros, not the NaN of an empty softmax.
        out = out.masked_fill(~mask_NS.any(dim=1).repeat(heads // groups)[:, None], 0.0)
    return out.view(groups, heads // groups, rows, width).permute(2, 0, 1, 3).reshape(rows, heads, width)
