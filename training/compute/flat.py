"""Named tensors that lie one after the other in one flat tensor: what is done to all of them is one operation.

An adapted model has hundreds of small matrices, and an operation on each costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from split_llama.errors import UsageError
from training.compute.lora import recording

# Elements that stay in a core's cache while they are widened to float64 or sorted.
PIECE = 1 << 16


class Layout:
    """Which tensors lie in a flat one: names and shapes, in their order."""

    __slots__ = ("_keys", "_names", "_shapes", "_sizes", "size")

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._names = list(shapes)
        self._keys = frozenset(self._names)
        self._shapes = [torch.Size(shape) for shape in shapes.values()]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Give the layout of these tensors, in their order."""
        if isinstance(tensors, FlatTensors):
            return tensors.layout
        return cls({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def names(self) -> Sequence[str]:
        """The tensors' names, in their order."""
        return self._names

    def is_same(self, other: Layout) -> bool:
        """Say whether both have the same names and shapes in the same order."""
        return self is other or (self._names == other._names and self._shapes == other._shapes)

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Say what keeps tensors, in whatever order, from this layout; nothing if they fit."""
        if tensors.keys() != self._keys:
            return f"{min(tensors.keys() ^ self._keys)} is in only one of the two"
        for name, shape in zip(self._names, self._shapes, strict=True):
            if tensors[name].shape != shape:
                return f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        return None

    def pack(self, tensors: Mapping[str, Tensor]) -> FlatTensors:
        """Copy tensors into a flat one, float32, that knows no graph; what has this layout already is given as it is.

        Raises `UsageError` for other names or shapes.
        """
        if isinstance(tensors, FlatTensors) and self.is_same(tensors.layout):
            return tensors
        misfit = self.misfit(tensors)
        if misfit is not None:
            raise UsageError(f"these tensors are not those expected: {misfit}")
        with recording(graph=False):
            parts = [tensors[name].reshape(-1) for name in self._names]
            return FlatTensors(self, torch.cat(parts).to(torch.float32) if parts else torch.zeros(0))

    def joined(self, *parts: FlatTensors) -> FlatTensors:
        """Put parts, of which this layout is made up in their order, into one; a single one is not copied."""
        filled = [part.flat for part in parts if part.layout.size]
        with recording(graph=False):
            return FlatTensors(self, filled[0] if len(filled) == 1 else torch.cat(filled or [torch.zeros(0)]))

    def zeros(self, device: torch.device) -> FlatTensors:
        """Give zeros."""
        with recording(graph=False):
            return FlatTensors(self, torch.zeros(self.size, device=device))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Give views of a flat tensor of this layout, by name."""
        with recording(graph=False):
            parts = zip(self._names, torch.split(flat, self._sizes), self._shapes, strict=True)
            return {name: part.view(shape) for name, part, shape in parts}


class FlatTensors(Mapping[str, Tensor]):
    """A flat tensor `[layout.size]`, float32, and as a mapping the tensors in it: views, made when asked for."""

    __slots__ = ("_views", "flat", "layout")

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        assert flat.shape == (layout.size,), "a flat tensor has the elements of its layout"
        self.layout = layout
        self.flat = flat
        self._views: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FlatTensors:
        """Copy tensors into a flat one; what is flat is given as it is."""
        return Layout.of(tensors).pack(tensors)

    @property
    def views(self) -> dict[str, Tensor]:
        """The tensors by name."""
        if self._views is None:
            self._views = self.layout.views(self.flat)
        return self._views

    def head(self, layout: Layout) -> FlatTensors:
        """Give the part at the beginning, which has this layout; it shares the storage."""
        assert self.layout.names[: len(layout.names)] == layout.names, "it begins with other tensors"
        with recording(graph=False):
            return FlatTensors(layout, self.flat[: layout.size])

    @property
    def is_finite(self) -> bool:
        """Say whether there is neither infinity nor NaN in it."""
        with recording(graph=False):
            # One quick pass. Only where squares overflow is every value looked at.
            return float(torch.linalg.vector_norm(self.flat)) < math.inf or bool(self.flat.isfinite().all())

    @property
    def norm(self) -> float:
        """The norm, gathered in float64: NaN or infinity if and only if a value is."""
        with recording(graph=False):
            pieces = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in torch.split(self.flat, PIECE)]
            return float(torch.linalg.vector_norm(torch.stack(pieces)))

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)
