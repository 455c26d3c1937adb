"""Adapters beside a segment's matrices, for passes whose rows have different ones: many adapters share one base.

Q, K, V and gate, up are multiplied as one matrix, so their adapters are joined likewise: the `lora_A` one below the
other, the `lora_B` on the diagonal of a matrix that is zero elsewhere. The adapters of one matrix are stacked. A
sequence names its adapter by its number in the bank, -1 for none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from split_llama.config import BlockRange
from split_llama.layers import FusedLinear, Segment
from split_llama.lora import Adapter

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """One stored matrix and its adapters: number i adds `scaling[i] * b[i] @ (a[i] @ x)`.

    `a` `[adapters, rank, in]` and `b` `[adapters, out, rank]` are filled up with zeros to the largest rank; `ranks`
    are those really used, 0 for an adapter that leaves the matrix alone. `scaling` is float32 `[adapters]`.
    """

    linear: FusedLinear
    a: Tensor
    b: Tensor
    scaling: Tensor
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    def add(self, adapter: int, x: Tensor, out: Tensor, rows: Tensor | None) -> None:
        """Add one adapter's update to `rows` of `out` `[N, out]`, or to all of them."""
        rank = self.ranks[adapter]
        if not rank:
            return
        a, b, scaling = self.a[adapter, :rank], self.b[adapter, :, :rank], self.scalings[adapter]
        if rows is None:
            out.add_(F.linear(F.linear(x, a), b), alpha=scaling)
        else:
            out.index_add_(0, rows, F.linear(F.linear(x.index_select(0, rows), a), b), alpha=scaling)


Groups = Sequence[tuple[int, Tensor | None]]


@dataclass(frozen=True, slots=True)
class _Grouped:
    """The hook of one matrix for one pass: each adapter with its rows, or `None` for all rows."""

    matrix: AdaptedMatrix
    groups: Groups

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        for adapter, rows in self.groups:
            self.matrix.add(adapter, x, out, rows)
        return out


class AdapterBank:
    """Adapters of one segment, in the segment's type and on its device; `matrices` lists those adapted in each block.

    A block that no adapter touches has none.
    """

    def __init__(self, segment: Segment, adapters: Sequence[Adapter]) -> None:
        """Take over what `adapters` have for the segment's blocks; each was checked against the model."""
        self.count = len(adapters)
        self._device = segment.device
        self.matrices: Mapping[int, tuple[AdaptedMatrix, ...]] = {
            block: tuple(_adapted(segment, block, layer, adapters))
            for block, layer in zip(range(segment.blocks.start, segment.blocks.stop), segment.layers, strict=True)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters here."""
        return sum(one.a.nbytes + one.b.nbytes for matrices in self.matrices.values() for one in matrices)

    @contextlib.contextmanager
    def over(self, blocks: BlockRange, adapter_of_row: Sequence[int]) -> Iterator[None]:
        """Have the matrices of `blocks` add each row's adapter while the context lasts.

        Only passes with adapters come here, so the others pay nothing; and what else was hooked up is put back.
        """
        groups = _groups(adapter_of_row, self._device)
        matrices = [one for block in range(blocks.start, blocks.stop) for one in self.matrices[block]]
        before = [one.linear.low_rank for one in matrices]
        try:
            for one in matrices:
                one.linear.low_rank = _Grouped(one, groups)
            yield
        finally:
            for one, hook in zip(matrices, before, strict=True):
                one.linear.low_rank = hook


def _groups(adapter_of_row: Sequence[int], device: torch.device) -> Groups:
    present = sorted(set(adapter_of_row) - {NO_ADAPTER})
    if len(present) == 1 and NO_ADAPTER not in adapter_of_row:
        return [(present[0], None)]
    numbers = torch.tensor(adapter_of_row)
    return [(adapter, (numbers == adapter).nonzero().flatten().to(device)) for adapter in present]


def _adapted(segment: Segment, block: int, layer: nn.Module, adapters: Sequence[Adapter]) -> Iterator[AdaptedMatrix]:
    for name, linear in layer.named_modules():
        if not isinstance(linear, FusedLinear):
            continue
        parent = f"model.layers.{block}.{name.rpartition('.')[0]}"
        held = [[part for part in linear.parts if f"{parent}.{part}.lora_A.weight" in one.tensors] for one in adapters]
        ranks = tuple(one.lora.r * len(parts) for one, parts in zip(adapters, held, strict=True))
        if not any(ranks):
            continue
        rank, outputs = max(ranks), sum(linear.parts.values())
        a = torch.zeros((len(adapters), rank, linear.width), dtype=segment.dtype, device=segment.device)
        b = torch.zeros((len(adapters), outputs, rank), dtype=segment.dtype, device=segment.device)
        for number, (adapter, parts) in enumerate(zip(adapters, held, strict=True)):
            _join(adapter, parent, linear, parts, a[number], b[number])
        scalings = tuple(one.lora.scaling for one in adapters)
        yield AdaptedMatrix(linear, a, b, torch.tensor(scalings, device=segment.device), ranks, scalings)


def _join(adapter: Adapter, parent: str, linear: FusedLinear, held: Sequence[str], a: Tensor, b: Tensor) -> None:
    """Write one adapter's tensors for the parts it has: `a` one below the other, `b` on the diagonal."""
    rank, row = adapter.lora.r, 0
    for part, rows in linear.parts.items():
        if part in held:
            place = slice(rank * held.index(part), rank * (held.index(part) + 1))
            a[place] = adapter.tensors[f"{parent}.{part}.lora_A.weight"]
            b[row : row + rows, place] = adapter.tensors[f"{parent}.{part}.lora_B.weight"]
        row += rows
