"""`silu_mul` beside the PyTorch composite."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.bandwidth import measured
from kernels.silu_mul import reference
from kernels.silu_mul.kernel import silu_mul


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Intermediate widths of LLaMA-2-7B and Llama-3-8B, bf16; few rows and many."""
    shapes = [(rows, width) for width in (11008, 14336) for rows in ((64, 8192) if quick else (1, 64, 512, 8192))]
    figures = []
    for rows, width in shapes if device.type == "cuda" else [(2, 48)]:
        gate_up = torch.randn(rows, 2 * width, device=device, dtype=torch.bfloat16)
        out = torch.empty(rows, width, device=device, dtype=torch.bfloat16)
        figures.append(
            measured(
                "silu_mul",
                f"{rows} rows of {width}, bf16",
                gate_up.nbytes + out.nbytes,
                lambda gate_up=gate_up, out=out: silu_mul(gate_up, out),
                lambda gate_up=gate_up, out=out: reference.silu_mul(gate_up, out),
                device,
                quick,
            )
        )
    return figures
