"""SwiGLU's product (Shazeer 2020): `silu(gate) * up` over rows that hold gate and up side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program `(row, block of columns)`; see `silu_mul`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_ptr = gate_up_ptr + row * (2 * WIDTH)
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    # exp of a number that is not positive cannot overflow.
    small = tl.exp(-tl.abs(gate))
    silu = gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    # Rounded between the two steps as the PyTorch composite does.
    silu = silu.to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up_N2I: Tensor, out_NI: Tensor) -> None:
    """Write `silu(gate) * up` to `out_NI`.

    `gate_up_N2I` holds gate in the first I columns of each row and up in the rest; both tensors are contiguous and
    fp32, fp16 or bf16. The product is taken in float32.
    """
    rows, width = out_NI.shape
    assert gate_up_N2I.shape == (rows, 2 * width), f"gate and up {tuple(gate_up_N2I.shape)}, out {tuple(out_NI.shape)}"
    assert gate_up_N2I.is_contiguous(), "rows of gate and up must be contiguous"
    assert out_NI.is_contiguous(), "rows of the output must be contiguous"
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        silu_mul_kernel[grid](gate_up_N2I, out_NI, WIDTH=width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
