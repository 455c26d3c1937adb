"""The tensors behind the pages: K and V of every hosted block, and the cache edits of a plan applied to them."""

from __future__ import annotations

import torch
from torch import Tensor

from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.pages import CacheEdit, CopyPage, MoveSlots, ZeroPages


def kv_page_bytes(config: ModelConfig, num_blocks: int, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes over `num_blocks` blocks, K and V together."""
    return 2 * num_blocks * page_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KVCache:
    """K and V, each `[blocks, pages, page_size, kv_heads, head_dim]`, for the blocks of one segment."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: BlockRange,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (len(blocks), num_pages, page_size, config.num_key_value_heads, config.head_dim)
        self.blocks = blocks
        self.page_size = page_size
        # Not cleared: what was never written is never visible, and on a CPU untouched pages cost no memory.
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of block `index` (numbered over the whole model) as `[slots, kv_heads, head_dim]` views."""
        local = index - self.blocks.start
        return self.k[local].flatten(0, 1), self.v[local].flatten(0, 1)

    def apply(self, edits: tuple[CacheEdit, ...]) -> None:
        """Carry out the edits in order, in every block."""
        for edit in edits:
            for cache in (self.k, self.v):
                self._apply_one(cache, edit)

    def _apply_one(self, cache: Tensor, edit: CacheEdit) -> None:
        match edit:
            case ZeroPages(pages):
                cache[:, list(pages)] = 0
            case CopyPage(source, target, slots):
                cache[:, target, :slots] = cache[:, source, :slots]
            case MoveSlots(sources, targets):
                flat = cache.flatten(1, 2)
                flat[:, list(targets)] = flat[:, list(sources)]
