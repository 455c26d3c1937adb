"""Rows of wire frames to and from the batch on the device, byte for byte as `split_llama.wire.codec` does on the host.

A row of `width` values takes, little-endian: fp32, bf16 and fp16 the values; int8 `width` signed bytes, then one fp16
scale per 64 values. Rows lie anywhere in a byte buffer; each row has its own codec.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
FP16 = tl.constexpr(2)
INT8 = tl.constexpr(3)
GROUP = tl.constexpr(64)
FP16_MAX = tl.constexpr(65504.0)
BF16_MAX = tl.constexpr(3.3895313892515355e38)
# float32 has no fraction bits left from 1.5 * 2^23 on: adding it and taking it away again rounds half to even.
ROUNDER = tl.constexpr(12582912.0)
EXPONENT = tl.constexpr(0x7F800000)

# Where aligned rows start, in bytes: what a thread loads at once.
ALIGNMENT = tl.constexpr(16)
DECODED_COLUMNS = 1024
ENCODED_GROUPS = 16


@triton.jit
def _row_start(payload_ptr, offsets_ptr, row, ALIGNED: tl.constexpr):
    """Point to a row's first byte."""
    offset = tl.load(offsets_ptr + row)
    if ALIGNED:
        offset = tl.multiple_of(offset, ALIGNMENT)
    return payload_ptr + offset


@triton.jit
def _load16(base, index, inside, ALIGNED: tl.constexpr):
    """Load little-endian 16-bit words as uint32."""
    if ALIGNED:
        words = base.to(tl.pointer_type(tl.uint16), bitcast=True)
        word = tl.load(words + index, mask=inside, other=0).to(tl.uint32)
    else:
        word = tl.load(base + 2 * index, mask=inside, other=0).to(tl.uint32)
        word |= tl.load(base + 2 * index + 1, mask=inside, other=0).to(tl.uint32) << 8
    return word


@triton.jit
def _load32(base, index, inside, ALIGNED: tl.constexpr):
    """Load little-endian 32-bit words as uint32."""
    if ALIGNED:
        words = base.to(tl.pointer_type(tl.uint32), bitcast=True)
        word = tl.load(words + index, mask=inside, other=0)
    else:
        word = _load16(base, 2 * index, inside, False)
        word |= _load16(base, 2 * index + 1, inside, False) << 16
    return word


@triton.jit
def _store16(base, index, word, inside, ALIGNED: tl.constexpr):
    """Store the low 16 bits of uint32 words, little-endian."""
    if ALIGNED:
        words = base.to(tl.pointer_type(tl.uint16), bitcast=True)
        tl.store(words + index, word.to(tl.uint16), mask=inside)
    else:
        tl.store(base + 2 * index, (word & 0xFF).to(tl.uint8), mask=inside)
        tl.store(base + 2 * index + 1, ((word >> 8) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def _store32(base, index, word, inside, ALIGNED: tl.constexpr):
    """Store uint32 words, little-endian."""
    if ALIGNED:
        words = base.to(tl.pointer_type(tl.uint32), bitcast=True)
        tl.store(words + index, word, mask=inside)
    else:
        _store16(base, 2 * index, word, inside, False)
        _store16(base, 2 * index + 1, word >> 16, inside, False)


@triton.jit
def _half_to_float(word):
    """Read uint32 words as fp16 values, in float32."""
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _finite(value):
    """Say which float32 values are neither NaN nor infinite."""
    return (value.to(tl.uint32, bitcast=True) & EXPONENT) != EXPONENT


@triton.jit
def _flag_unless(finite, flag_ptr):
    """Set a row's flag unless all its values are finite."""
    if tl.min(tl.ravel(finite.to(tl.int32)), axis=0) == 0:
        tl.store(flag_ptr, 1)


@triton.jit
def decode_rows_kernel(
    payload_ptr,
    offsets_ptr,
    codecs_ptr,
    out_ptr,
    bad_ptr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAG: tl.constexpr,
):
    """Program `(row, block of columns)`; see `decode_rows`."""
    row = tl.program_id(0)
    codec = tl.load(codecs_ptr + row)
    if codec >= 0:
        base = _row_start(payload_ptr, offsets_ptr, row, ALIGNED)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        if codec == FP32:
            value = _load32(base, columns, inside, ALIGNED).to(tl.float32, bitcast=True)
        elif codec == BF16:
            value = (_load16(base, columns, inside, ALIGNED) << 16).to(tl.float32, bitcast=True)
        elif codec == FP16:
            value = _half_to_float(_load16(base, columns, inside, ALIGNED))
        else:
            level = tl.load(base + columns, mask=inside, other=0).to(tl.int8, bitcast=True)
            scale = _half_to_float(_load16(base + WIDTH, columns // GROUP, inside, ALIGNED))
            value = level.to(tl.float32) * scale
        tl.store(out_ptr + row.to(tl.int64) * WIDTH + columns, value.to(out_ptr.dtype.element_ty), mask=inside)
        if FLAG:
            _flag_unless(_finite(value), bad_ptr + row)


@triton.jit
def _int8_levels(value):
    """Give the levels of `[groups, 64]` values, and per group the bits of the smallest fp16 scale >= amax / 127."""
    largest = tl.max(tl.abs(value), axis=1)
    quotient = tl.minimum(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)), FP16_MAX)
    nearest = quotient.to(tl.float16)
    # Positive fp16 numbers sort like their bits, so adding one gives the next larger.
    bits = nearest.to(tl.uint16, bitcast=True).to(tl.uint32) + (nearest.to(tl.float32) < quotient).to(tl.uint32)
    scale = _half_to_float(bits)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    level = tl.div_rn(value, tl.broadcast_to(divisor[:, None], value.shape))
    level = tl.minimum(tl.maximum(level, -127.0), 127.0)
    return (level + ROUNDER) - ROUNDER, bits


@triton.jit
def encode_rows_kernel(
    states_ptr,
    rows_ptr,
    offsets_ptr,
    codecs_ptr,
    payload_ptr,
    bad_ptr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program `(reply row, block of groups)`; see `encode_rows`."""
    row = tl.program_id(0)
    codec = tl.load(codecs_ptr + row)
    if codec >= 0:
        source = tl.load(rows_ptr + row).to(tl.int64)
        base = _row_start(payload_ptr, offsets_ptr, row, ALIGNED)
        groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = columns < WIDTH
        value = tl.load(states_ptr + source * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        finite = _finite(value)
        _flag_unless(finite, bad_ptr + row)
        value = tl.where(finite, value, 0.0)
        if codec == FP32:
            _store32(base, columns, value.to(tl.uint32, bitcast=True), inside, ALIGNED)
        elif codec == BF16:
            clipped = tl.minimum(tl.maximum(value, -BF16_MAX), BF16_MAX)
            bits = clipped.to(tl.uint32, bitcast=True)
            # Half a unit in the last place, less one where the last kept bit is even: rounds to nearest even.
            bits += ((bits >> 16) & 1) + 0x7FFF
            _store16(base, columns, bits >> 16, inside, ALIGNED)
        elif codec == FP16:
            clipped = tl.minimum(tl.maximum(value, -FP16_MAX), FP16_MAX)
            bits = clipped.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            _store16(base, columns, bits, inside, ALIGNED)
        else:
            level, scales = _int8_levels(value)
            tl.store(base + columns, level.to(tl.int8).to(tl.uint8, bitcast=True), mask=inside)
            _store16(base + WIDTH, groups, scales, groups * GROUP < WIDTH, ALIGNED)


def decode_rows(
    payload: Tensor,
    offsets_N: Tensor,
    codecs_N: Tensor,
    out_ND: Tensor,
    *,
    bad_N: Tensor | None = None,
    aligned: bool = False,
) -> None:
    """Decode row n from `payload` (uint8), byte `offsets_N[n]` (int64) on, into `out_ND[n]` (fp32, fp16 or bf16).

    `codecs_N` (int32) holds the wire's numbers of the codecs; -1 leaves the row alone. `bad_N` (int32), where given,
    is set to 1 for rows with NaN or infinity and is otherwise not touched. `aligned` promises that every row starts
    at a multiple of 16 bytes from a buffer that does too: loads are wide then. Otherwise rows lie at any byte.
    """
    rows, width = out_ND.shape
    assert payload.dtype.itemsize == 1, f"payload must be bytes, not {payload.dtype}"
    assert len(offsets_N) == len(codecs_N) == rows, f"{len(offsets_N)} offsets, {len(codecs_N)} codecs, {rows} rows"
    assert out_ND.is_contiguous(), "rows of the batch must be contiguous"
    if not rows:
        return
    decode_rows_kernel[(rows, triton.cdiv(width, DECODED_COLUMNS))](
        payload,
        offsets_N,
        codecs_N,
        out_ND,
        bad_N,
        WIDTH=width,
        COLUMNS=min(DECODED_COLUMNS, triton.next_power_of_2(width)),
        ALIGNED=aligned and width % 2 == 0,
        FLAG=bad_N is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )


def encode_rows(
    states_ND: Tensor,
    rows_R: Tensor,
    offsets_R: Tensor,
    codecs_R: Tensor,
    payload: Tensor,
    bad_R: Tensor,
    *,
    aligned: bool = False,
) -> None:
    """Encode `states_ND[rows_R[r]]` into `payload` (uint8) from byte `offsets_R[r]` on with codec `codecs_R[r]`.

    States are fp32, fp16 or bf16; `rows_R` int32, `offsets_R` int64, `codecs_R` int32 (-1: no reply row). `bad_R`
    (int32) is set to 1 where a row is not finite (NaN and infinity are encoded as 0 then) and is otherwise not
    touched: the caller clears it. `aligned` as in `decode_rows`.
    """
    width, count = states_ND.shape[1], len(rows_R)
    assert payload.dtype.itemsize == 1, f"payload must be bytes, not {payload.dtype}"
    assert len(offsets_R) == len(codecs_R) == len(bad_R) == count, "one row, offset, codec and flag per reply row"
    assert states_ND.is_contiguous(), "rows of states must be contiguous"
    if not count:
        return
    groups = triton.cdiv(width, GROUP.value)
    per_program = min(ENCODED_GROUPS, triton.next_power_of_2(groups))
    encode_rows_kernel[(count, triton.cdiv(groups, per_program))](
        states_ND,
        rows_R,
        offsets_R,
        codecs_R,
        payload,
        bad_R,
        WIDTH=width,
        GROUPS=per_program,
        ALIGNED=aligned and width % 2 == 0,
        num_warps=4,
        enable_fp_fusion=True,
    )
