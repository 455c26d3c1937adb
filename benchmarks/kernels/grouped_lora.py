"""`grouped_lora` beside the PyTorch composite, with one adapter and with many."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.bandwidth import measured
from kernels.grouped_lora import reference
from kernels.grouped_lora.kernel import grouped_lora


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Q, K and V of an 8B model (4,096 to 6,144), bf16: rows that share an adapter, and rows with one each."""
    ranks = (16,) if quick else (8, 16, 64)
    cases = [(rows, adapters, rank) for rank in ranks for rows, adapters in ((64, 1), (64, 16), (64, 64), (4096, 4))]
    if device.type != "cuda":
        return [_figures(device, quick, 2, 2, 4, 64, 48)]
    return [_figures(device, quick, *case, 4096, 6144) for case in cases]


def _figures(
    device: torch.device, quick: bool, rows: int, adapters: int, rank: int, inputs: int, outputs: int
) -> dict[str, Any]:
    x, a, b, out = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((rows, inputs), (adapters, rank, inputs), (adapters, outputs, rank), (rows, outputs))
    )
    # Rows of one session lie together; with as many adapters as rows each row is a session.
    adapter = (torch.arange(rows, device=device) * adapters // rows).to(torch.int32)
    scaling = torch.ones(adapters, device=device)
    return measured(
        "grouped_lora",
        f"{rows} rows, {adapters} adapters of rank {rank}, {inputs} to {outputs}, bf16",
        x.nbytes + a.nbytes + b.nbytes + 2 * out.nbytes,
        lambda: grouped_lora(x, a, b, adapter, scaling, out),
        lambda: reference.grouped_lora(x, a, b, adapter, scaling, out),
        device,
        quick,
        composite_in_graph=False,
    )
