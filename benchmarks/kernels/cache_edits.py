"""Slot moves, page copies and page clears in all blocks beside the PyTorch composite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.bandwidth import measured
from kernels.cache_edits import kernel, reference

PAGE_SIZE = 16


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """28 blocks of 8 heads of 128 in bf16: what 1 and 64 sessions accept, copy and clear in a step."""
    if device.type != "cuda":
        return _figures(device, quick, blocks=2, heads=1, width=8, sessions=2)
    return [
        row
        for sessions in ((64,) if quick else (1, 64))
        for row in _figures(device, quick, blocks=28, heads=8, width=128, sessions=sessions)
    ]


def _figures(
    device: torch.device, quick: bool, *, blocks: int, heads: int, width: int, sessions: int
) -> list[dict[str, Any]]:
    k = torch.zeros(blocks, 2 * sessions, PAGE_SIZE, heads, width, dtype=torch.bfloat16, device=device)
    v = torch.zeros_like(k)
    pages = torch.arange(sessions, device=device) * 2
    targets = pages[:, None] * PAGE_SIZE + torch.arange(4, device=device)
    copies = torch.stack((pages, pages + 1, torch.full_like(pages, PAGE_SIZE)), dim=1)
    slot = 2 * blocks * heads * width * k.dtype.itemsize
    edits: list[tuple[str, int, tuple[Tensor, ...]]] = [
        ("move_slots", 2 * 4 * sessions * slot, (targets + 5, targets)),
        ("copy_page", 2 * PAGE_SIZE * sessions * slot, (copies,)),
        ("zero_pages", PAGE_SIZE * sessions * slot, (pages,)),
    ]

    def call(module: Any, name: str, numbers: tuple[Tensor, ...]) -> Callable[[], object]:
        return lambda: getattr(module, name)(k, v, *numbers)

    return [
        measured(
            name, f"{sessions} sessions, {blocks} blocks, {heads} heads of {width}, bf16", moved,
            call(kernel, name, numbers), call(reference, name, numbers), device, quick, composite_in_graph=False,
        )
        for name, moved, numbers in edits
    ]  # fmt: skip
