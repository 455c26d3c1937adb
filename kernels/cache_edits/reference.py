"""Cache edits in plain PyTorch: what `split_llama.engine.kv_cache.KVCache.apply` does, from tensors of edits."""

from __future__ import annotations

import torch
from torch import Tensor


def move_slots(
    k: Tensor,
    v: Tensor,
    sources_SE: Tensor,
    targets_SE: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Move slots; see `kernels.cache_edits.kernel`."""
    moved = (sources_SE >= 0) & (targets_SE >= 0)
    for cache in (k, v, k_scale, v_scale):
        if cache is not None:
            flat = _storage(cache).flatten(1, 2)
            flat[:, targets_SE[moved]] = flat[:, sources_SE[moved]]


def copy_page(
    k: Tensor, v: Tensor, copies_C3: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """Copy pages; see `kernels.cache_edits.kernel`."""
    for source, target, slots in copies_C3.tolist():
        for cache in (k, v, k_scale, v_scale):
            if cache is not None and target >= 0:
                _storage(cache)[:, target, :slots] = _storage(cache)[:, source, :slots]


def zero_pages(
    k: Tensor, v: Tensor, pages_Z: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """Clear pages; see `kernels.cache_edits.kernel`."""
    for cache in (k, v, k_scale, v_scale):
        if cache is not None:
            _storage(cache)[:, pages_Z[pages_Z >= 0]] = 0


def _storage(cache: Tensor) -> Tensor:
    """Give fp8 as bytes: PyTorch does not index it."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
