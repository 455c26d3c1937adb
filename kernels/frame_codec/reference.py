"""The frame codec in plain PyTorch: the kernels' reference, and the composite that they are timed beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP32, BF16, FP16, INT8 = range(4)
GROUP = 64
FP16_MAX = 65504.0
BF16_MAX = 3.3895313892515355e38
STORED = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}


def row_bytes(codec: int, width: int) -> int:
    """Give the bytes of one row of `width` values."""
    return width + 2 * -(-width // GROUP) if codec == INT8 else width * STORED[codec].itemsize


def decode_rows(
    payload: Tensor, offsets_N: Tensor, codecs_N: Tensor, out_ND: Tensor, *, bad_N: Tensor | None = None
) -> None:
    """Decode rows codec by codec; see `kernels.frame_codec.kernel`."""
    width = out_ND.shape[1]
    for codec in range(4):
        rows = (codecs_N == codec).nonzero().flatten()
        raw = payload[offsets_N[rows, None] + torch.arange(row_bytes(codec, width), device=payload.device)]
        if codec == INT8:
            scales = raw[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float16)
            scales = scales.float().repeat_interleave(GROUP, dim=1)
            values = raw[:, :width].view(torch.int8).float() * scales[:, :width]
        else:
            values = raw.view(STORED[codec]).float()
        out_ND[rows] = values.to(out_ND.dtype)
        if bad_N is not None:
            bad_N[rows[~values.isfinite().all(dim=1)]] = 1


def encode_rows(
    states_ND: Tensor, rows_R: Tensor, offsets_R: Tensor, codecs_R: Tensor, payload: Tensor, bad_R: Tensor
) -> None:
    """Encode rows codec by codec; see `kernels.frame_codec.kernel`."""
    width = states_ND.shape[1]
    for codec in range(4):
        replies = (codecs_R == codec).nonzero().flatten()
        values = states_ND[rows_R[replies]].float()
        bad_R[replies[~values.isfinite().all(dim=1)]] = 1
        raw = _encode_int8(values) if codec == INT8 else _saturated(values, codec).view(torch.uint8)
        payload[offsets_R[replies, None] + torch.arange(row_bytes(codec, width), device=payload.device)] = raw


def _saturated(values: Tensor, codec: int) -> Tensor:
    limit = {FP32: float("inf"), BF16: BF16_MAX, FP16: FP16_MAX}[codec]
    return values.clamp(-limit, limit).to(STORED[codec])


def _encode_int8(values: Tensor) -> Tensor:
    width = values.shape[1]
    grouped = F.pad(values, (0, -width % GROUP)).view(len(values), -(-width // GROUP), GROUP)
    quotient = (grouped.abs().amax(dim=2) / 127).clamp(max=FP16_MAX)
    nearest = quotient.half()
    scales = (nearest.view(torch.int16) + (nearest.float() < quotient)).view(torch.float16)
    divisor = torch.where(scales == 0, 1.0, scales.float())
    levels = (grouped / divisor[:, :, None]).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((levels.flatten(1)[:, :width].view(torch.uint8), scales.view(torch.uint8)), dim=1)
