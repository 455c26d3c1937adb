"""Rotary positions (Su et al. 2021), and K and V into their pages, in one pass over the fused product.

Optionally Qwen3's RMSNorm of each head of Q and K comes first. K and V are stored as they are, or as int8 or fp8 with
one scale per (slot, head): the largest magnitude over 127 or 448.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_pages import QUANTISED_MAX, KVPages
from kernels.runtime import next_power_of_two

# Pairs of coordinates that one program turns: 16 heads of 128, so that a thread's cosines serve several heads.
PAIRS = 1024
# float32 has no fraction bits left from 1.5 * 2^23 on: adding it and taking it away again rounds half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _load_halves(row_ptr, heads, inside, HEAD_DIM: tl.constexpr):
    """Load the two halves of some heads, each `[heads, HALF]`, in float32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, triton.next_power_of_2(HALF))
    mask = inside[:, None] & (pairs < HALF)[None, :]
    at = row_ptr + heads[:, None] * HEAD_DIM + pairs[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _normed(first, second, weight_ptr, eps, HEAD_DIM: tl.constexpr):
    """Norm each head (RMSNorm) and scale it by the weights `[HEAD_DIM]`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, triton.next_power_of_2(HALF))
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    first_weight = tl.load(weight_ptr + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    return first * scale * first_weight[None, :], second * scale * second_weight[None, :]


@triton.jit
def _turned(first, second, position, frequencies_ptr, HEAD_DIM: tl.constexpr):
    """Turn the pairs (first, second) by the position's angles."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, triton.next_power_of_2(HALF))
    angles = position.to(tl.float32) * tl.load(frequencies_ptr + pairs, mask=pairs < HALF, other=0.0)
    cosines, sines = tl.cos(angles)[None, :], tl.sin(angles)[None, :]
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def _float8_bits(x):
    """Give the float8_e4m3fn bits of numbers within +-448, rounded to nearest even.

    In integers, because sm_80 has no such conversion.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Half a unit of the 3 bits kept, less one where the last is even; then the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the unit is 2^-9 throughout.
    subnormal = ((magnitude.to(tl.float32, bitcast=True) * 512.0 + ROUNDER) - ROUNDER).to(tl.uint32)
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantised(x, divisor, LARGEST: tl.constexpr, FLOAT8: tl.constexpr):
    """Divide by the scale and round to the storage's numbers."""
    level = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    # A scale so small that it was rounded itself may give more than the largest.
    level = tl.minimum(tl.maximum(level, -LARGEST), LARGEST)
    return _float8_bits(level) if FLOAT8 else ((level + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def _store_heads(
    first, second, ptr, scale_ptr, row, heads, inside,
    ROW_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LARGEST: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Store heads to `ptr[row]`; `LARGEST` is the storage's largest number, 0 where it has no scales."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, triton.next_power_of_2(HALF))
    mask = inside[:, None] & (pairs < HALF)[None, :]
    at = ptr + (row * ROW_HEADS + heads)[:, None] * HEAD_DIM + pairs[None, :]
    if LARGEST > 0:
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
        tl.store(scale_ptr + row * ROW_HEADS + heads, scale, mask=inside)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        tl.store(at, _quantised(first, divisor, LARGEST, FLOAT8), mask=mask)
        tl.store(at + HALF, _quantised(second, divisor, LARGEST, FLOAT8), mask=mask)
    else:
        tl.store(at, first.to(ptr.dtype.element_ty), mask=mask)
        tl.store(at + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_write_kernel(
    qkv_ptr, positions_ptr, slots_ptr, frequencies_ptr, q_norm_ptr, k_norm_ptr, eps, q_out_ptr,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr,
    LARGEST: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Program `(row, tile)`: first the tiles of `TILE` query heads, then of the key heads, then of the value heads."""
    Q_TILES: tl.constexpr = (HEADS + TILE - 1) // TILE
    KV_TILES: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row_ptr = qkv_ptr + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    position = tl.load(positions_ptr + row)
    if part < Q_TILES:
        heads = part * TILE + tl.arange(0, TILE)
        inside = heads < HEADS
        first, second = _load_halves(row_ptr, heads, inside, HEAD_DIM)
        if NORM:
            first, second = _normed(first, second, q_norm_ptr, eps, HEAD_DIM)
        first, second = _turned(first, second, position, frequencies_ptr, HEAD_DIM)
        _store_heads(first, second, q_out_ptr, q_out_ptr, row, heads, inside, HEADS, HEAD_DIM, 0, False)
    else:
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            if part < Q_TILES + KV_TILES:
                heads = (part - Q_TILES) * TILE + tl.arange(0, TILE)
                inside = heads < KV_HEADS
                first, second = _load_halves(row_ptr + HEADS * HEAD_DIM, heads, inside, HEAD_DIM)
                if NORM:
                    first, second = _normed(first, second, k_norm_ptr, eps, HEAD_DIM)
                first, second = _turned(first, second, position, frequencies_ptr, HEAD_DIM)
                _store_heads(
                    first, second, k_ptr, k_scale_ptr, slot, heads, inside, KV_HEADS, HEAD_DIM, LARGEST, FLOAT8
                )
            else:
                heads = (part - Q_TILES - KV_TILES) * TILE + tl.arange(0, TILE)
                inside = heads < KV_HEADS
                first, second = _load_halves(row_ptr + (HEADS + KV_HEADS) * HEAD_DIM, heads, inside, HEAD_DIM)
                _store_heads(
                    first, second, v_ptr, v_scale_ptr, slot, heads, inside, KV_HEADS, HEAD_DIM, LARGEST, FLOAT8
                )


def rotary_write(
    qkv_NXK: Tensor,
    positions_N: Tensor,
    slots_N: Tensor,
    inverse_frequencies: Tensor,
    kv: KVPages,
    *,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float,
    q_out_NHK: Tensor,
) -> None:
    """Norm (where weights `[K]` are given) and turn Q and K; write Q to `q_out_NHK`, K and V to the pages.

    `qkv_NXK` holds per row the query, key and value heads, X = H + 2G, contiguous, fp32, fp16 or bf16. `positions_N`
    int32 are rotary positions; `slots_N` int64 say where K and V go, page * page_size + offset; -1 stores nothing.
    `inverse_frequencies` float32 `[K / 2]`. All arithmetic is float32; the halves of K are the two coordinates (the
    Hugging Face layout).
    """
    rows, width = len(qkv_NXK), kv.head_dim
    assert qkv_NXK.shape == (rows, heads + 2 * kv_heads, width), f"qkv of {tuple(qkv_NXK.shape)}, head_dim {width}"
    assert q_out_NHK.shape == (rows, heads, width), f"queries of {tuple(q_out_NHK.shape)} for {rows} rows"
    assert qkv_NXK.is_contiguous(), "rows of qkv must be contiguous"
    assert q_out_NHK.is_contiguous(), "rows of the queries must be contiguous"
    assert kv.kv_heads == kv_heads, f"pages for {kv.kv_heads} heads, rows with {kv_heads}"
    assert len(positions_N) == len(slots_N) == rows, f"{len(positions_N)} positions, {len(slots_N)} slots, {rows} rows"
    assert (q_norm is None) == (k_norm is None), "norms of both Q and K, or of neither"
    if not rows:
        return
    float8 = kv.k.dtype == torch.float8_e4m3fn
    tile = min(max(PAIRS // next_power_of_two(width // 2), 1), next_power_of_two(max(heads, kv_heads)))
    rotary_write_kernel[(rows, triton.cdiv(heads, tile) + 2 * triton.cdiv(kv_heads, tile))](
        qkv_NXK,
        positions_N,
        slots_N,
        inverse_frequencies,
        q_norm,
        k_norm,
        eps,
        q_out_NHK,
        kv.k.view(torch.uint8) if float8 else kv.k,
        kv.v.view(torch.uint8) if float8 else kv.v,
        kv.k_scale,
        kv.v_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=width,
        TILE=tile,
        NORM=q_norm is not None,
        LARGEST=QUANTISED_MAX.get(kv.k.dtype, 0.0),
        FLOAT8=float8,
        num_warps=2,
        enable_fp_fusion=True,
    )
