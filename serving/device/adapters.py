"""Adapters on the device: after each stored matrix the grouped kernel adds every row's own one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.grouped_lora.kernel import grouped_lora
from split_llama.engine.low_rank import AdaptedMatrix, AdapterBank
from split_llama.layers import FusedLinear

# The kernel holds a tile of all ranks in shared memory; this is what it was built and checked for.
MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class _Slice:
    """At most `MOST_RANKS` ranks of a matrix's adapters: `a` `[adapters, ranks, in]`, `b` `[adapters, out, ranks]`."""

    a: Tensor
    b: Tensor
    scaling: Tensor


class DeviceAdapters:
    """A bank's adapters, by the matrix that they belong to."""

    def __init__(self, bank: AdapterBank) -> None:
        self._slices: dict[FusedLinear, tuple[_Slice, ...]] = {
            matrix.linear: _cut(matrix) for matrices in bank.matrices.values() for matrix in matrices
        }

    def add(self, linear: FusedLinear, x_ND: Tensor, adapter_N: Tensor, out_NO: Tensor) -> None:  # noqa: N803
        """Add the updates of `linear` to the rows of `out_NO` whose adapter (int32) is not -1."""
        for part in self._slices.get(linear, ()):
            grouped_lora(x_ND, part.a, part.b, adapter_N, part.scaling, out_NO)


def _cut(matrix: AdaptedMatrix) -> tuple[_Slice, ...]:
    starts = range(0, matrix.a.shape[1], MOST_RANKS)
    return tuple(
        _Slice(
            matrix.a[:, start : start + MOST_RANKS].contiguous(),
            matrix.b[:, :, start : start + MOST_RANKS].contiguous(),
            matrix.scaling,
        )
        for start in starts
    )
