"""`rotary_write` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_pages import KVPages, quantise


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
    """Norm, turn and store; see `kernels.rotary_write.kernel`."""
    q_NHK, k_NGK, v_NGK = torch.split(qkv_NXK.float(), [heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q_NHK, k_NGK = _normed(q_NHK, q_norm, eps), _normed(k_NGK, k_norm, eps)
    angles = positions_N.float()[:, None] * inverse_frequencies
    cosines, sines = (part.repeat(1, 2)[:, None, :] for part in (angles.cos(), angles.sin()))
    q_out_NHK.copy_(_turned(q_NHK, cosines, sines))
    stored = (slots_N >= 0).nonzero().flatten()
    slots = slots_N[stored]
    _store(kv.k, kv.k_scale, slots, _turned(k_NGK, cosines, sines)[stored])
    _store(kv.v, kv.v_scale, slots, v_NGK[stored])


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def _store(pages: Tensor, scales: Tensor | None, slots: Tensor, x_NGK: Tensor) -> None:
    flat = pages.flatten(0, 1)
    if scales is None:
        flat[slots] = x_NGK.to(pages.dtype)
        return
    stored, scale = quantise(x_NGK, pages.dtype)
    # Indexed stores know no fp8; bytes do.
    flat.view(torch.uint8)[slots] = stored.view(torch.uint8)
    scales.flatten(0, 1)[slots] = scale
