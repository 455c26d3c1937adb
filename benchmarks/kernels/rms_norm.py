"""`add_rms_norm` beside the PyTorch composite."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.bandwidth import measured
from kernels.rms_norm import reference
from kernels.rms_norm.kernel import add_rms_norm


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Hidden widths of 8B and 70B models, bf16, with a residual; few rows and many."""
    shapes = [(rows, width) for width in (4096, 8192) for rows in ((64, 8192) if quick else (1, 64, 512, 8192))]
    figures = []
    for rows, width in shapes if device.type == "cuda" else [(2, 48)]:
        x, residual, out = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(3))
        weight, total = torch.ones(width, device=device, dtype=torch.bfloat16), torch.empty_like(out)
        outputs = {"out_ND": out, "residual_out_ND": total}
        arguments = (x, residual, weight, 1e-5)
        figures.append(
            measured(
                "add_rms_norm",
                f"{rows} rows of {width}, bf16",
                4 * x.nbytes + weight.nbytes,
                lambda arguments=arguments, outputs=outputs: add_rms_norm(*arguments, **outputs),
                lambda arguments=arguments, outputs=outputs: reference.add_rms_norm(*arguments, **outputs),
                device,
                quick,
            )
        )
    return figures
