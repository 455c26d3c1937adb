"""The tensors behind the pages: K and V of every hosted block, and the cache edits of a plan applied to them."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.pages import CacheEdit, CopyPage, DropSwap, MoveSlots, SwapIn, SwapOut, ZeroPages
from split_llama.engine.swap import SwapStore

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
# The largest stored magnitude of a quantised type: amax of a head maps to it.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Order(Enum):
    """What lies side by side in memory; the shape of `KVCache.k` and `v` is the same."""

    PAGES = "all heads of a slot, then the next slot: what the kernels read"
    HEADS = "all slots of a head, then the next head: what PyTorch's attention reads fastest"

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Reorder `[blocks, pages, page_size, kv_heads, head_dim]`."""
        blocks, pages, page_size, heads, width = shape
        return shape if self is Order.PAGES else (blocks, heads, pages, page_size, width)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Take memory that need not be cleared: what was never written is never visible.

    On a CPU memory costs nothing until it is written to, and then by the system's page. Large pages, which suit the
    weights, would have each session take, and clear, megabytes for every head of every block.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _in_order(storage: Tensor, order: Order) -> Tensor:
    return storage if order is Order.PAGES else storage.permute(0, 2, 3, 1, 4)


def kv_page_bytes(config: ModelConfig, num_blocks: int, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes over `num_blocks` blocks, K and V together, with the scales of a quantised type."""
    head = config.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype in LARGEST else 0)
    return 2 * num_blocks * page_size * config.num_key_value_heads * head


class KVCache:
    """K and V, each `[blocks, pages, page_size, kv_heads, head_dim]`, for the blocks of one segment.

    `dtype` is the type that blocks compute in, `kv_dtype` the type that is stored (by default the same). Int8 and fp8
    (e4m3) are stored with a float32 scale per slot and head, `k_scale` and `v_scale`: `[blocks, pages, page_size,
    kv_heads]`, which are `None` for plain types. See `quantise` for the formula. Up to `swap_pages` pages' contents may
    lie in host memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: BlockRange,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        swap_pages: int = 0,
        order: Order = Order.PAGES,
    ) -> None:
        stored = kv_dtype or dtype
        shape = (len(blocks), num_pages, page_size, config.num_key_value_heads, config.head_dim)
        self.blocks = blocks
        self.page_size = page_size
        self.compute_dtype = dtype
        self.k = _in_order(_allocate(order.of(shape), stored, device), order)
        self.v = _in_order(_allocate(order.of(shape), stored, device), order)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if stored in LARGEST:
            self.k_scale = torch.empty(shape[:-1], dtype=torch.float32, device=device)
            self.v_scale = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        # What edits move about.
        self._stores = [_movable(t) for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]
        self._swap = SwapStore(self._stores, swap_pages)
        # Views `[blocks, 1, kv_heads, slots, head_dim]` of K and V, where they are stored in the type of the blocks.
        self.heads_first: tuple[Tensor, Tensor] | None = None
        if stored == dtype:
            k, v = (tensor.flatten(1, 2)[:, None].transpose(2, 3) for tensor in (self.k, self.v))
            self.heads_first = (k, v)
        self._parts = [
            (_Part.of(self.k, self.k_scale, local), _Part.of(self.v, self.v_scale, local))
            for local in range(len(blocks))
        ]

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of block `index` (numbered over the whole model) as stored: `[slots, kv_heads, head_dim]` views."""
        local = index - self.blocks.start
        return self.k[local].flatten(0, 1), self.v[local].flatten(0, 1)

    def write(self, block: int, slots_N: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> None:
        """Store rows of block `block` in cache slots (int64, `page * page_size + offset`)."""
        k, v = self._parts[block - self.blocks.start]
        k.write(slots_N, k_NGK)
        v.write(slots_N, v_NGK)

    def read(self, block: int, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Give K and V `[slots, kv_heads, head_dim]` in the compute type; a slice of plain K and V copies nothing."""
        k, v = self._parts[block - self.blocks.start]
        return k.read(slots, self.compute_dtype), v.read(slots, self.compute_dtype)

    def apply(self, edits: tuple[CacheEdit, ...]) -> None:
        """Carry out the edits in order, in every block.

        One that fails is left out and the first failure raised at the end: later ones may belong to other sequences.
        """
        failure: Exception | None = None
        for edit in edits:
            try:
                self._apply_one(edit)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def settle(self, edits: tuple[CacheEdit, ...]) -> None:
        """After a plan failed: carry out its swaps as far as they were not, before the next plan starts.

        Whoever was evicted for the plan, or forked meanwhile, depends on them; all other edits concern the plan's own
        sequences.
        """
        for edit in edits:
            match edit:
                case SwapOut(pages, ticket):
                    self._swap.put(pages, ticket)
                case SwapIn(ticket, pages) if ticket in self._swap:
                    self._swap.take(ticket, pages)
                case DropSwap(ticket):
                    self._swap.drop(ticket)

    def holds(self, ticket: int) -> bool:
        """Say whether a ticket's pages lie in host memory."""
        return ticket in self._swap

    def _apply_one(self, edit: CacheEdit) -> None:
        match edit:
            case SwapOut(pages, ticket):
                self._swap.put(pages, ticket)
            case SwapIn(ticket, pages):
                self._swap.take(ticket, pages)
            case DropSwap(ticket):
                self._swap.drop(ticket)
            case _:
                for cache in self._stores:
                    _change(cache, edit)


def quantise(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round rows `[..., head_dim]` to int8 or fp8: gives the stored values and the float32 scales `[...]`.

    scale = amax / 127 (int8) or amax / 448 (fp8), stored = round to nearest even (x / scale); a row of zeros has
    scale 0 and stores zeros. A row that is not finite gives a scale that is not, so that it cannot pass for a number.
    """
    largest = LARGEST[dtype]
    exact = rows.float()
    scale = exact.abs().amax(dim=-1) / largest
    # Dividing the smallest numbers by their rounded scale may pass the largest value, which fp8 would store as NaN.
    stored = torch.where(scale[..., None] == 0, 0.0, exact / scale[..., None]).clamp_(-largest, largest)
    return (stored.round_() if dtype == torch.int8 else stored).to(dtype), scale


def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """Give back float32 rows `[..., head_dim]` of what `quantise` made."""
    return stored.float() * scale[..., None]


def _change(cache: Tensor, edit: ZeroPages | CopyPage | MoveSlots) -> None:
    match edit:
        case ZeroPages(pages):
            cache[:, list(pages)] = 0
        case CopyPage(source, target, slots):
            cache[:, target, :slots] = cache[:, source, :slots]
        case MoveSlots(sources, targets):
            flat = cache.flatten(1, 2)
            flat[:, list(targets)] = flat[:, list(sources)]


@dataclass(frozen=True, slots=True)
class _Part:
    """K or V of one block as slots: `values [slots, kv_heads, head_dim]` of `dtype`, `scales [slots, kv_heads]`."""

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, values: Tensor, scales: Tensor | None, local: int) -> _Part:
        return cls(
            _movable(values[local]).flatten(0, 1),
            None if scales is None else scales[local].flatten(0, 1),
            values.dtype,
        )

    def write(self, slots_N: Tensor, rows_NGK: Tensor) -> None:
        if self.scales is None:
            self.values.index_copy_(0, slots_N, rows_NGK.to(self.dtype))
            return
        stored, scale = quantise(rows_NGK, self.dtype)
        self.values.index_copy_(0, slots_N, _movable(stored))
        self.scales.index_copy_(0, slots_N, scale)

    def read(self, slots: slice | Tensor, dtype: torch.dtype) -> Tensor:
        stored = _take(self.values, slots)
        if self.scales is None:
            return stored.to(dtype)
        return dequantise(stored.view(self.dtype), _take(self.scales, slots)).to(dtype)


def _movable(tensor: Tensor) -> Tensor:
    """Give fp8 as the bytes it is: few operations know that type."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _take(cache: Tensor, slots: slice | Tensor) -> Tensor:
    # index_select gathers three times faster than indexing does.
    return cache[slots] if isinstance(slots, slice) else cache.index_select(0, slots)
