"""LoRA (Hu et al. 2021) for a batch whose rows have different adapters: `out += scaling * b @ (a @ x)`.

Two launches: the first shrinks rows to the rank, in pieces of the input's width so that few rows still fill the
device; the second sums the pieces and expands. A tile is 16 rows; the first row of a tile with some adapter leads, and
its program serves all rows of the tile with that adapter. So each tile reads an adapter once, however rows are mixed,
and what a row gets does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime import interpreting, next_power_of_two

# The least rows and ranks that tensor cores multiply.
ROWS = tl.constexpr(16)
LEAST_RANK = 16
PIECE = 512
STEP = 128
OUTPUTS = 128


@triton.jit
def _led_rows(adapters_ptr, row, rows):
    """Give the tile's rows, which of them share the row's adapter, that adapter, and whether the row leads them."""
    tile = row // ROWS * ROWS + tl.arange(0, ROWS)
    adapters = tl.load(adapters_ptr + tile, mask=tile < rows, other=-1)
    adapter = tl.load(adapters_ptr + row)
    same = adapters == adapter
    earlier = tl.max((same & (tile < row)).to(tl.int32), axis=0)
    return tile.to(tl.int64), same, adapter.to(tl.int64), (adapter >= 0) & (earlier == 0)


# Not specialised to the number of rows: a batch of another size compiles nothing anew.
@triton.jit(do_not_specialize=["rows"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    adapters_ptr,
    shrunk_ptr,
    rows,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PIECE: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program `(row, piece)`: `shrunk[piece] = a[:, piece] @ x[piece]` for the rows that `row` leads."""
    row, piece = tl.program_id(0), tl.program_id(1)
    tile, led, adapter, leads = _led_rows(adapters_ptr, row, rows)
    if leads:
        ranks = tl.arange(0, RANKS)
        shrunk = tl.zeros((ROWS, RANKS), tl.float32)
        for start in range(0, PIECE, STEP):
            columns = piece * PIECE + start + tl.arange(0, STEP)
            inside = columns < WIDTH
            x = tl.load(
                x_ptr + tile[:, None] * WIDTH + columns[None, :], mask=led[:, None] & inside[None, :], other=0.0
            )
            a = tl.load(
                a_ptr + adapter * (RANK * WIDTH) + ranks[None, :] * WIDTH + columns[:, None],
                mask=(ranks < RANK)[None, :] & inside[:, None],
                other=0.0,
            )
            if UPCAST:
                x, a = x.to(tl.float32), a.to(tl.float32)
            shrunk = tl.dot(x, a, shrunk, input_precision="ieee")
        at = (piece.to(tl.int64) * rows + tile)[:, None] * RANKS + ranks[None, :]
        tl.store(shrunk_ptr + at, shrunk, mask=led[:, None])


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    shrunk_ptr,
    b_ptr,
    adapters_ptr,
    scaling_ptr,
    out_ptr,
    rows,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PIECES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program `(row, block of outputs)`: `out += scaling * b @ sum of pieces` for the rows that `row` leads."""
    row, block = tl.program_id(0), tl.program_id(1)
    tile, led, adapter, leads = _led_rows(adapters_ptr, row, rows)
    if leads:
        ranks = tl.arange(0, RANKS)
        shrunk = tl.zeros((ROWS, RANKS), tl.float32)
        for piece in range(PIECES):
            at = (piece * rows + tile)[:, None] * RANKS + ranks[None, :]
            shrunk += tl.load(shrunk_ptr + at, mask=led[:, None], other=0.0)
        outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = outputs < WIDTH
        b = tl.load(
            b_ptr + adapter * (WIDTH * RANK) + outputs[None, :] * RANK + ranks[:, None],
            mask=inside[None, :] & (ranks < RANK)[:, None],
            other=0.0,
        )
        # Rounded to the weights' dtype between the products, as PEFT does.
        narrow = shrunk.to(b_ptr.dtype.element_ty)
        if UPCAST:
            narrow, b = narrow.to(tl.float32), b.to(tl.float32)
        product = tl.dot(narrow, b, input_precision="ieee") * tl.load(scaling_ptr + adapter)
        at = out_ptr + tile[:, None] * WIDTH + outputs[None, :]
        mask = led[:, None] & inside[None, :]
        total = tl.load(at, mask=mask, other=0.0).to(tl.float32) + product
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_lora(x_NI: Tensor, a: Tensor, b: Tensor, adapter_N: Tensor, scaling: Tensor, out_NO: Tensor) -> None:
    """Add `scaling[i] * b[i] @ (a[i] @ x)` to each row of `out_NO` whose adapter i is not -1; leave the others alone.

    `a` `[adapters, rank, I]` and `b` `[adapters, O, rank]` share the dtype of `x_NI` (fp32, fp16, bf16) and are
    contiguous; adapters of lower rank are padded with zeros. `adapter_N` int32, `scaling` float32 `[adapters]`.
    Sums are float32.
    """
    rows, width = x_NI.shape
    adapters, rank, inputs = a.shape
    outputs = out_NO.shape[1]
    assert inputs == width, f"a takes {inputs} inputs, rows have {width}"
    assert b.shape == (adapters, outputs, rank), f"b of {tuple(b.shape)} beside a of {tuple(a.shape)}"
    assert len(adapter_N) == len(out_NO) == rows, f"{len(adapter_N)} adapters, {len(out_NO)} outputs, {rows} rows"
    assert x_NI.dtype == a.dtype == b.dtype, f"rows {x_NI.dtype}, a {a.dtype}, b {b.dtype}"
    assert all(part.is_contiguous() for part in (x_NI, a, b, out_NO)), "rows and weights must be contiguous"
    if not rows:
        return
    ranks = max(LEAST_RANK, next_power_of_two(rank))
    pieces = triton.cdiv(width, PIECE)
    shrunk = torch.empty((pieces, rows, ranks), dtype=torch.float32, device=x_NI.device)
    shrink_kernel[(rows, pieces)](
        x_NI, a, adapter_N, shrunk, rows,
        WIDTH=width, RANK=rank, RANKS=ranks, PIECE=PIECE, STEP=STEP, UPCAST=interpreting(),
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    expand_kernel[(rows, triton.cdiv(outputs, OUTPUTS))](
        shrunk, b, adapter_N, scaling, out_NO, rows,
        WIDTH=outputs, RANK=rank, RANKS=ranks, PIECES=pieces, OUTPUTS=OUTPUTS, UPCAST=interpreting(),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
