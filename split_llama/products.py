"""How rows are multiplied by a stored matrix: as it is, in a layout made for CPUs, or quantised.

Decoding streams every weight for each token, so a CPU's product is as fast as its bytes are few and its reading is
straight. Which way is used depends on the type of the weights and the number of rows alone, never on a timing: the
same model gives the same numbers after a restart. The rates behind each rule are those of `benchmarks/products.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from split_llama.config import QUANTIZATIONS
from split_llama.errors import UsageError

# A smaller matrix stays in a core's cache from token to token, and packing it gains nothing.
IN_CACHE = 2**18
# oneDNN's kernels read their packed weights a quarter faster for four rows than for one or two.
GOOD_ROWS = 4
# Above so many rows, products of float16 on a CPU are slower than making the weights float32 piece by piece.
FP16_ROWS = 2
# Elements of such a piece: its float32 copy stays in a core's cache.
PIECE = 2**18
QUANTISED_AT_ONCE = 2**24
INT4_GROUP = 128


class Product(Protocol):
    """A stored matrix `[out, D]`, maybe with a bias."""

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        ...

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Multiply rows `[N, D]` in the compute type; gives `[N, out]` in the same type."""
        ...


@dataclass(frozen=True, slots=True)
class Numerics:
    """In what a party computes: the type of the weights as stored, their quantisation, and the type of all else.

    On a CPU all else is float32: sixteen-bit arithmetic is slower there and no better.
    """

    weights: torch.dtype
    quantization: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise UsageError(f"--quantization must be one of {', '.join(QUANTIZATIONS)}; got {self.quantization!r}")
        if self.device.type == "cpu" and self.quantization in ("fp8", "int4"):
            raise UsageError(f"--quantization {self.quantization} needs a CUDA device; on a CPU there is int8")

    @property
    def compute(self) -> torch.dtype:
        """The type of states, norms, biases and by default of KV."""
        return torch.float32 if self.device.type == "cpu" else self.weights

    @property
    def label(self) -> str:
        """What the weights are: `float32`, `bfloat16`, `int8` ..."""
        return str(self.weights).removeprefix("torch.") if self.quantization == "none" else self.quantization

    def product(self, weight: Tensor, bias: Tensor | None) -> Product | None:
        """Make the product of a matrix of any type; `None` where the dense matrix in the compute type serves best.

        The weights are copied: they may lie in a mapped file.
        """
        if self.quantization != "none":
            on_cpu = self.device.type == "cpu"
            if on_cpu:
                return DynamicInt8(weight, bias)
            return TorchAo(weight.to(self.device, self.compute), bias, self.quantization)
        if self.device.type != "cpu" or (self.weights == torch.float32 and weight.numel() < IN_CACHE):
            return None
        if self.weights == torch.float16:
            return Half(weight, bias)
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return Packed(weight, bias, self.weights)
        return None if self.weights == self.compute else Rounded(weight, bias, self.weights)


class Packed:
    """Float32 or bfloat16 in oneDNN's blocked layout: 16 rows cost about twice as much as one.

    The operators are those that `torch.compile` uses for frozen weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._bias = None if bias is None else bias.to(dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), GOOD_ROWS)
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default._op
        self.nbytes = weight.numel() * dtype.itemsize

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Multiply; see `Product`."""
        rows = len(x_ND)
        x = x_ND.to(self._dtype)
        if rows <= GOOD_ROWS // 2:
            x = x.repeat(GOOD_ROWS // rows, 1)
        out = self._multiply(x, self._weight, self._bias, "none", [], "")
        return out[:rows].to(x_ND.dtype)


class Rounded:
    """Weights of another type than the states, for a CPU without oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight.to(dtype, copy=True)
        self._bias = bias
        self.nbytes = self._weight.nbytes

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Multiply; see `Product`."""
        out = F.linear(x_ND.to(self._weight.dtype), self._weight).to(x_ND.dtype)
        return out if self._bias is None else out.add_(self._bias)


class Half:
    """Float16 weights: the fastest product of one row in 16 bits, and with more mantissa than bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.to(torch.float16, copy=True)
        self._bias = bias
        self.nbytes = weight.numel() * self._weight.itemsize

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Multiply; see `Product`."""
        if len(x_ND) <= FP16_ROWS:
            out = F.linear(x_ND.to(torch.float16), self._weight).to(x_ND.dtype)
        else:
            pieces = torch.split(self._weight, max(1, PIECE // self._weight.shape[1]))
            out = torch.cat([x_ND @ piece.to(x_ND.dtype).t() for piece in pieces], dim=1)
        return out if self._bias is None else out.add_(self._bias)


class DynamicInt8:
    """Int8 weights with a scale per output, rows quantised as they come (PyTorch's dynamic quantised linear).

    The operator takes one scale for all rows of a call. So several rows are each divided by their own largest value
    first, and a row that spans [-1, 1] rides along: then no row's result depends on who shares its batch. A row that
    is alone is rounded over its own range instead, which is never coarser; the two differ by rounding.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # Without 8-bit dot products in hardware, sums of full-range products overflow 16 bits.
        self._reduce_range = not torch.cpu._is_vnni_supported()
        self._weight: Any = torch.ops.quantized.linear_prepack(_per_output_int8(weight), None)
        # The operator without its Python wrapper, which costs as much as a small product.
        self._multiply: Callable[..., Tensor] = torch.ops.quantized.linear_dynamic.default._op
        self._bias = bias
        self._range_1D = torch.zeros(1, weight.shape[1])
        self._range_1D[0, :2] = torch.tensor([-1.0, 1.0])
        self.nbytes = weight.numel()

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Multiply; see `Product`."""
        if len(x_ND) == 1:
            out = self._multiply(x_ND, self._weight, self._reduce_range)
        else:
            peaks_N1 = x_ND.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
            rows = torch.cat((x_ND / peaks_N1, self._range_1D))
            out = self._multiply(rows, self._weight, self._reduce_range)[:-1] * peaks_N1
        return out if self._bias is None else out.add_(self._bias)


def _per_output_int8(weight: Tensor) -> Tensor:
    """Round each output's weights to int8 by their largest; piece by piece, for a copy in float32 may not fit."""
    levels = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float64)
    rows = max(1, QUANTISED_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), rows):
        piece = weight[first : first + rows].float()
        scale = piece.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        levels[first : first + rows] = (piece / scale[:, None]).round_().to(torch.int8)
        scales[first : first + rows] = scale
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch means to drop this tensor type, but its fast int8 product takes no other.
        warnings.simplefilter("ignore", UserWarning)
        return torch._make_per_channel_quantized_tensor(levels, scales, zeros, 0)


class TorchAo:
    """Weights quantised by torchao, for CUDA: int8 weights, fp8 weights and rows, or int4 weights in groups of 128."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: str) -> None:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        _torchao_quantize(linear, quantization)
        self._linear = linear
        self._bias = bias
        bits = 4 if quantization == "int4" else 8
        self.nbytes = weight.numel() * bits // 8

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Multiply; see `Product`."""
        out: Tensor = self._linear(x_ND)
        return out if self._bias is None else out + self._bias


def _torchao_quantize(linear: torch.nn.Linear, quantization: str) -> None:
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise UsageError(
            f"--quantization {quantization} on CUDA needs torchao: pip install 'fl-llama[quant]' ({error})"
        ) from None
    configs: dict[str, Callable[[], Any]] = {
        "int8": lambda: ao.Int8WeightOnlyConfig(set_inductor_config=False),
        "fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False),
        "int4": lambda: ao.Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        ),
    }
    ao.quantize_(linear, configs[quantization]())
