"""`silu_mul` in plain PyTorch: what `split_llama.layers.MLP` does between its two products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up_N2I: Tensor, out_NI: Tensor) -> None:
    """Write `silu(gate) * up` to `out_NI`; see `kernels.silu_mul.kernel`."""
    gate, up = gate_up_N2I.chunk(2, dim=-1)
    out_NI.copy_(F.silu(gate) * up)
