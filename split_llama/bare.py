"""A block made for inference on a CPU: the maths of `split_llama.layers.Block` with as little around it as can be.

While a token is decoded, streaming the weights throws everything else out of a core's caches, and what is around the
products then costs several times what it costs by itself. So the modules' parts are taken out once, and the norm is
made of the fewest operations that PyTorch has for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from split_llama.layers import Block, BlockAttention, FusedLinear, RMSNorm, rotate

Multiply = Callable[[Tensor], Tensor]


class BareNorm:
    """RMSNorm as `x / sqrt(|x|^2 + D eps) * (sqrt(D) w)`."""

    def __init__(self, norm: RMSNorm) -> None:
        width = len(norm.weight)
        self._weight = norm.weight * math.sqrt(width)
        self._floor = torch.tensor(math.sqrt(width * norm.eps))

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(torch.hypot(length, self._floor)).mul_(self._weight)


class BareBlock:
    """One block over ragged rows; float32 states."""

    def __init__(self, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._input_norm = BareNorm(block.input_layernorm)
        self._post_norm = BareNorm(block.post_attention_layernorm)
        self._qkv = _multiply(attention.qkv_proj)
        self._out = _multiply(attention.o_proj)
        self._gate_up = _multiply(mlp.gate_up_proj)
        self._down = _multiply(mlp.down_proj)
        self._q_norm = None if attention.q_norm is None else BareNorm(attention.q_norm)
        self._k_norm = None if attention.k_norm is None else BareNorm(attention.k_norm)
        self._heads = attention.heads[0]
        self._rotated = attention.rotated
        self._head_dim = attention.head_dim
        self._inner = mlp.down_proj.width

    def __call__(self, block: int, x_ND: Tensor, cos: Tensor, sin: Tensor, attend: BlockAttention) -> Tensor:
        """Give the block's output `[N, D]`; `block` is its number in the whole model."""
        rows = x_ND.shape[0]
        qkv_NXK = self._qkv(self._input_norm(x_ND)).view(rows, -1, self._head_dim)
        qk_NXK = qkv_NXK[:, : self._rotated]
        if self._q_norm is not None and self._k_norm is not None:
            q_NHK, k_NGK = qk_NXK[:, : self._heads], qk_NXK[:, self._heads :]
            qk_NXK = torch.cat((self._q_norm(q_NHK), self._k_norm(k_NGK)), dim=1)
        qk_NXK = rotate(qk_NXK, cos, sin)
        attended = attend(block, qk_NXK[:, : self._heads], qk_NXK[:, self._heads :], qkv_NXK[:, self._rotated :])
        x_ND = x_ND + self._out(attended.flatten(1))
        gate_up = self._gate_up(self._post_norm(x_ND))
        return x_ND + self._down(F.silu(gate_up[:, : self._inner]).mul_(gate_up[:, self._inner :]))


def _multiply(linear: FusedLinear) -> Multiply:
    product = _product(linear)

    def multiply(x: Tensor) -> Tensor:
        # Looked up each time: adapters come and go while the block stays.
        out, low_rank = product(x), linear.low_rank
        return out if low_rank is None else low_rank(x, out)

    return multiply


def _product(linear: FusedLinear) -> Multiply:
    if linear.product is not None:
        return linear.product
    weight, bias = linear.weight, linear.bias
    assert weight is not None, "a matrix is dense or packed"
    return lambda x: F.linear(x, weight, bias)
