"""Tensor codecs: how the rows of hidden states travel. Numpy only; every row is self-contained.

A row of `width` values takes

- fp32, bf16, fp16: the values, little-endian;
- int8: `width` signed bytes, then `ceil(width / 64)` little-endian fp16 scales, one per 64 values.

So the rows of several steps concatenate, and a log of rows can be replayed byte for byte. The int8 scales are per 64
values and not per token: LLaMA-2 has coordinates some 10^4 times larger than the rest, and one scale per token rounds
all the others to zero.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from split_llama.errors import BadStates, NonFiniteStates, UsageError

GROUP = 64
INT8_MAX = 127
FP16_MAX = 65504.0
BF16_MAX = 3.3895313892515355e38

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Payload = bytes | bytearray | memoryview


class Codec(IntEnum):
    """A tensor codec, by its number on the wire."""

    FP32 = 0
    BF16 = 1
    FP16 = 2
    INT8 = 3

    @property
    def label(self) -> str:
        """The name users see: `int8`, `fp16` ..."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> Codec:
        """Read a user's choice. Raises `UsageError` that lists the codecs."""
        for codec in cls:
            if codec.label == label.strip().lower():
                return codec
        raise UsageError(f"unknown codec {label!r}: expected one of {', '.join(codec.label for codec in cls)}")

    @classmethod
    def from_wire(cls, number: int) -> Codec:
        """Read a header's codec byte. Raises `BadStates`."""
        codec = _CODECS.get(number)
        if codec is None:
            known = ", ".join(f"{codec.value} ({codec.label})" for codec in cls)
            raise BadStates(f"unknown codec {number}: expected one of {known}")
        return codec


_CODECS = {codec.value: codec for codec in Codec}  # a dict lookup is several times faster than the constructor

# The bits of an exponent of ones, one place to the left; what int8 stores in fp16 are its scales.
_EXPONENTS = {
    Codec.FP32: np.array(0xFF000000, "<u4"),
    Codec.BF16: np.array(0xFF00, "<u2"),
    Codec.FP16: np.array(0xF800, "<u2"),
    Codec.INT8: np.array(0xF800, "<u2"),
}


def row_bytes(codec: Codec, width: int) -> int:
    """Give the bytes of one row of `width` values."""
    if codec is Codec.INT8:
        return width + 2 * _groups(width)
    return width * (4 if codec is Codec.FP32 else 2)


def encode_rows(codec: Codec, states: Floats) -> bytes:
    """Encode `states` `[n, d]` float32. The same states give the same bytes.

    bf16 and fp16 round to nearest even and saturate at their largest finite value. int8 takes per group of 64 the
    smallest fp16 scale that is at least `max(|x|) / 127` and rounds `x / scale` to nearest even.
    Raises `NonFiniteStates` on NaN or infinity.
    """
    assert states.ndim == 2, f"states must be [n, d], got {states.shape}"
    states = np.ascontiguousarray(states, dtype=np.float32)
    _check_finite(states)
    if codec is Codec.FP32:
        return states.astype("<f4", copy=False).tobytes()
    if codec is Codec.FP16:
        return np.clip(states, -FP16_MAX, FP16_MAX).astype("<f2").tobytes()
    if codec is Codec.BF16:
        return _encode_bf16(states)
    return _encode_int8(states)


def decode_rows(codec: Codec, payload: Payload, out: Floats) -> None:
    """Decode `payload` into `out` `[n, d]` float32, C-contiguous (a slice of a batch's rows).

    Raises `BadStates` when the payload has not the bytes of exactly n rows (`out` is untouched then) and
    `NonFiniteStates` when it holds NaN or infinity.
    """
    assert out.ndim == 2, f"out must be [n, d], got {out.shape}"
    assert out.flags.c_contiguous, "out must be contiguous rows"
    count, width = out.shape
    expected = count * row_bytes(codec, width)
    if len(payload) != expected:
        raise BadStates(
            f"expected {expected} bytes for {count} rows of {width} values in {codec.label}, {len(payload)} came"
        )
    if codec is Codec.INT8:
        _decode_int8(payload, out)
    elif codec is Codec.BF16:
        bits = out.view(np.uint32)
        bits[...] = np.frombuffer(payload, "<u2").reshape(out.shape)
        bits <<= 16
    else:
        stored: str = "<f4" if codec is Codec.FP32 else "<f2"
        out[...] = np.frombuffer(payload, stored).reshape(out.shape)
    _check_finite(out)


def finite_rows(codec: Codec, rows: Bytes, width: int) -> npt.NDArray[np.bool_]:
    """Say of each encoded row, `[n, row_bytes]`, whether all its values are finite: bool `[n]`. Nothing is decoded."""
    if codec is Codec.INT8:
        rows = np.ascontiguousarray(rows[:, width:])
    exponent = _EXPONENTS[codec]
    bits = rows.view(exponent.dtype)
    # Adding a number to itself shifts its sign out: what is left is not finite from an exponent of ones on.
    finite: npt.NDArray[np.bool_] = (bits + bits).max(axis=1) < exponent
    return finite


def _groups(width: int) -> int:
    return -(-width // GROUP)


def _check_finite(values: npt.NDArray[Any]) -> None:
    if np.isfinite(values).all():
        return
    rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
    raise NonFiniteStates(f"NaN or infinity in row {rows[0]} of {len(values)} ({len(rows)} rows have some)")


def _encode_bf16(states: Floats) -> bytes:
    bits = np.clip(states, -BF16_MAX, BF16_MAX).view(np.uint32)
    # Adding half a unit in the last place, less one where the last kept bit is even, rounds to nearest even.
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return (bits >> 16).astype("<u2").tobytes()


def _encode_int8(states: Floats) -> bytes:
    count, width = states.shape
    groups = _groups(width)
    grouped = _pad(states, groups * GROUP).reshape(count, groups, GROUP)
    quotient = np.minimum(np.abs(grouped).max(axis=2) / np.float32(INT8_MAX), np.float32(FP16_MAX))
    scales = quotient.astype("<f2")
    # Positive fp16 numbers sort like their bits, so adding one gives the next larger: never a scale that clips.
    scales.view("<u2")[...] += scales < quotient
    divisor = scales.astype(np.float32)
    divisor[divisor == 0] = 1
    levels = np.clip(np.rint(grouped / divisor[:, :, None]), -INT8_MAX, INT8_MAX).astype(np.int8)
    rows = np.empty((count, row_bytes(Codec.INT8, width)), np.uint8)
    rows[:, :width] = levels.reshape(count, groups * GROUP)[:, :width].view(np.uint8)
    rows[:, width:] = scales.view(np.uint8)
    return rows.tobytes()


def _decode_int8(payload: Payload, out: Floats) -> None:
    count, width = out.shape
    groups = _groups(width)
    raw = np.frombuffer(payload, np.uint8).reshape(count, row_bytes(Codec.INT8, width))
    levels = raw[:, :width].view(np.int8)
    scales = np.ascontiguousarray(raw[:, width:]).view("<f2").astype(np.float32)
    _check_finite(scales)
    if width % GROUP:
        np.multiply(levels, np.repeat(scales, GROUP, axis=1)[:, :width], out=out)
    else:
        shape = (count, groups, GROUP)
        np.multiply(levels.reshape(shape), scales[:, :, None], out=out.reshape(shape))


def _pad(states: Floats, width: int) -> Floats:
    if states.shape[1] == width:
        return states
    padded = np.zeros((len(states), width), np.float32)
    padded[:, : states.shape[1]] = states
    return padded
