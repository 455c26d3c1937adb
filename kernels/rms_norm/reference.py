"""`add_rms_norm` in plain PyTorch: what a block's residual sum and `split_llama.layers.RMSNorm` do."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(
    x_ND: Tensor,
    residual_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    *,
    out_ND: Tensor,
    residual_out_ND: Tensor | None = None,
) -> None:
    """Sum, norm and scale; see `kernels.rms_norm.kernel`."""
    total = x_ND if residual_ND is None else x_ND + residual_ND
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if residual_out_ND is not None:
        residual_out_ND.copy_(total)
    out_ND.copy_(weight_D * normed.to(x_ND.dtype))
