"""`rotary_write` beside the PyTorch composite, for every storage of the pages."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.bandwidth import measured
from kernels.kv_pages import QUANTISED_MAX, KVPages
from kernels.rotary_write import reference
from kernels.rotary_write.kernel import rotary_write

STORAGE = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
PAGE_SIZE = 16


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """32 query heads of 128, with 8 and 32 key-value heads; few rows and many."""
    shapes = [(rows, 32, groups, 128) for groups in (8, 32) for rows in ((64, 8192) if quick else (1, 64, 8192))]
    return [
        _figures(device, quick, storage, *shape)
        for shape in (shapes if device.type == "cuda" else [(2, 2, 1, 8)])
        for storage in STORAGE
    ]


def _figures(
    device: torch.device, quick: bool, storage: torch.dtype, rows: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, Any]:
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, device=device, dtype=torch.bfloat16)
    q_out = torch.empty(rows, heads, head_dim, device=device, dtype=torch.bfloat16)
    kv = _pages(device, storage, -(-rows // PAGE_SIZE), kv_heads, head_dim)
    numbers = (
        torch.arange(rows, dtype=torch.int32, device=device),
        torch.randperm(rows, device=device),
        1 / 10000 ** (torch.arange(0, head_dim, 2, device=device) / head_dim),
    )
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "eps": 1e-6, "q_out_NHK": q_out}
    written = 2 * rows * kv_heads * (head_dim * storage.itemsize + (4 if storage in QUANTISED_MAX else 0))
    return measured(
        "rotary_write",
        f"{rows} rows, {heads} and {kv_heads} heads of {head_dim}, bf16 to {str(storage).removeprefix('torch.')}",
        qkv.nbytes + q_out.nbytes + written,
        lambda: rotary_write(qkv, *numbers, kv, **shape),
        lambda: reference.rotary_write(qkv, *numbers, kv, **shape),
        device,
        quick,
        composite_in_graph=False,
    )


def _pages(device: torch.device, storage: torch.dtype, pages: int, kv_heads: int, head_dim: int) -> KVPages:
    shape = (pages, PAGE_SIZE, kv_heads, head_dim)
    k, v = (torch.zeros(shape, device=device).to(storage) for _ in range(2))
    if storage not in QUANTISED_MAX:
        return KVPages(k, v)
    return KVPages(k, v, *(torch.zeros(shape[:3], device=device) for _ in range(2)))
