"""The frame codec's two directions beside the PyTorch composite, for every codec."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.bandwidth import measured
from kernels.frame_codec import reference
from kernels.frame_codec.kernel import decode_rows, encode_rows

NAMES = {reference.FP32: "fp32", reference.BF16: "bf16", reference.FP16: "fp16", reference.INT8: "int8"}


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Rows of 4,096 bf16 states, few and many; whole rows start at multiples of 16 bytes, or anywhere."""
    shapes = [(rows, 4096) for rows in ((64, 8192) if quick else (1, 64, 1024, 8192))]
    figures = []
    for rows, width in shapes if device.type == "cuda" else [(2, 64)]:
        for codec in NAMES:
            for aligned in (True, False):
                figures += _figures(device, quick, rows, width, codec, aligned)
    return figures


def _figures(
    device: torch.device, quick: bool, rows: int, width: int, codec: int, aligned: bool
) -> list[dict[str, Any]]:
    states = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(states)
    pitch = reference.row_bytes(codec, width)
    pitch += -pitch % 16 if aligned else 1 - pitch % 2
    offsets = torch.arange(rows, device=device) * pitch
    codecs = torch.full((rows,), codec, dtype=torch.int32, device=device)
    sources = torch.arange(rows, dtype=torch.int32, device=device)
    payload, bad = torch.zeros(rows * pitch, dtype=torch.uint8, device=device), torch.zeros_like(codecs)
    moved = states.nbytes + rows * reference.row_bytes(codec, width)
    case = f"{rows} rows of {width}, {NAMES[codec]}, {'aligned' if aligned else 'at any byte'}"
    encoded = (states, sources, offsets, codecs, payload, bad)
    decoded = (payload, offsets, codecs, out)
    return [
        measured(
            "encode_rows", case, moved,
            lambda: encode_rows(*encoded, aligned=aligned), lambda: reference.encode_rows(*encoded),
            device, quick, composite_in_graph=False,
        ),
        measured(
            "decode_rows", case, moved,
            lambda: decode_rows(*decoded, aligned=aligned), lambda: reference.decode_rows(*decoded),
            device, quick, composite_in_graph=False,
        ),
    ]  # fmt: skip
