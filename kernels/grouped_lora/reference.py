"""`grouped_lora` in plain PyTorch: adapter by adapter, as PEFT applies each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grouped_lora(x_NI: Tensor, a: Tensor, b: Tensor, adapter_N: Tensor, scaling: Tensor, out_NO: Tensor) -> None:
    """Add each row's adapter; see `kernels.grouped_lora.kernel`."""
    for adapter in range(len(a)):
        rows = (adapter_N == adapter).nonzero().flatten()
        product = F.linear(F.linear(x_NI[rows], a[adapter]), b[adapter]).float() * scaling[adapter]
        out_NO[rows] = (out_NO[rows].float() + product).to(out_NO.dtype)
