"""Residual sum and RMSNorm (Zhang and Sennrich 2019) of rows in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    out_ptr,
    residual_out_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One program per row, which it holds in registers; see `add_rms_norm`."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        # Rounded before it is normed, so that the norm sees what the next block will add to.
        x = (x + residual).to(dtype).to(tl.float32)
    if KEEP:
        tl.store(residual_out_ptr + start + columns, x.to(dtype), mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (x * scale).to(dtype).to(tl.float32) * weight
    tl.store(out_ptr + start + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(
    x_ND: Tensor,
    residual_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    *,
    out_ND: Tensor,
    residual_out_ND: Tensor | None = None,
) -> None:
    """Write `x + residual` to `residual_out_ND`, if given, and the norm of that sum times `weight_D` to `out_ND`.

    Rows are contiguous; `x`, `residual` and `residual_out` share a dtype (fp32, fp16 or bf16), to which the sum and
    the normed values are rounded as in `split_llama.layers.RMSNorm`; sums and means are float32. Outputs may be the
    inputs themselves.
    """
    rows, width = x_ND.shape
    for tensor in (x_ND, residual_ND, out_ND, residual_out_ND):
        if tensor is not None:
            assert tensor.shape == x_ND.shape, f"rows of {tuple(tensor.shape)} beside rows of {tuple(x_ND.shape)}"
            assert tensor.is_contiguous(), "rows must be contiguous"
    for tensor in (residual_ND, residual_out_ND):
        assert tensor is None or tensor.dtype == x_ND.dtype, f"a residual in {tensor.dtype}, rows in {x_ND.dtype}"
    assert weight_D.shape == (width,), f"weight of {tuple(weight_D.shape)} for rows of {width}"
    if not rows:
        return
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(rows,)](
        x_ND,
        residual_ND,
        weight_D,
        eps,
        out_ND,
        residual_out_ND,
        WIDTH=width,
        BLOCK=block,
        ADD=residual_ND is not None,
        KEEP=residual_out_ND is not None,
        num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=True,
    )
