"""Memory of a pass: pinned host memory handed out piece by piece, and named arrays packed into one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.device.device import Device

# Every piece begins at a multiple of this: wide loads, and one compiled kernel whatever lies before a piece.
ALIGNMENT = 64
Array = npt.NDArray[Any]


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """Round bytes up."""
    return -(-size // alignment) * alignment


class HostArena:
    """Host memory of one pass, pinned. `take` pieces, `reset` to have all of them back; grows to what a pass needs."""

    def __init__(self, device: Device, size: int = 2**16) -> None:
        self._device = device
        self._chunks = [device.host_bytes(size)]
        self._used = 0

    def reset(self) -> None:
        """Take all pieces back: no copy from or to them may be under way."""
        if len(self._chunks) > 1:
            self._chunks = [self._device.host_bytes(sum(len(chunk) for chunk in self._chunks))]
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Give uint8 `[size]`, not cleared."""
        if self._used + size > len(self._chunks[-1]):
            self._chunks.append(self._device.host_bytes(aligned(max(size, len(self._chunks[-1])))))
            self._used = 0
        piece = self._chunks[-1][self._used : self._used + size]
        self._used += aligned(size)
        return piece


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a packing; `dtype` is "int32" or "int64"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Packing:
    """Arrays of integers in one buffer, so that one copy takes them all to the device."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._places: list[tuple[Field, int]] = []
        self.size = 0
        for field in fields:
            self._places.append((field, self.size))
            self.size += aligned(field.size)

    def arrays(self, host: Tensor) -> dict[str, Array]:
        """Give the fields of a host buffer uint8 `[size]` as numpy views."""
        raw = host.numpy()
        return {
            field.name: raw[at : at + field.size].view(field.dtype).reshape(field.shape) for field, at in self._places
        }

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Give the fields of a device buffer uint8 `[size]` as views."""
        return {
            field.name: buffer[at : at + field.size].view(getattr(torch, field.dtype)).view(field.shape)
            for field, at in self._places
        }


def upload(arrays: dict[str, Array], arena: HostArena, device: Device) -> dict[str, Tensor]:
    """Copy integer arrays to the device in one go, without waiting for it."""
    packing = Packing([Field(name, array.dtype.name, array.shape) for name, array in arrays.items()])
    host = arena.take(packing.size)
    for name, view in packing.arrays(host).items():
        view[...] = arrays[name]
    buffer = torch.empty(packing.size, dtype=torch.uint8, device=device.torch_device)
    buffer.copy_(host, non_blocking=True)
    return packing.tensors(buffer)
