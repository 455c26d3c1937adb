"""Pages whose contents lie in host memory, each group of them under a ticket."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from split_llama.engine.free_runs import FreeRuns


class SwapStore:
    """Room for `num_pages` pages of the tensors `near`, each `[blocks, pages, ...]`, in host memory.

    Copies keep every bit. On CUDA the memory is page-locked, and copies take their place in the current stream's order.
    """

    def __init__(self, near: Sequence[Tensor], num_pages: int) -> None:
        self._near = tuple(near)
        self._far = tuple(
            torch.empty((tensor.shape[0], num_pages, *tensor.shape[2:]), dtype=tensor.dtype) for tensor in near
        )
        for far, tensor in zip(self._far, near, strict=True):
            if tensor.is_cuda and far.nbytes:
                _lock(far)
                weakref.finalize(self, _unlock, far)
        self._free = FreeRuns(num_pages)
        self._tickets: dict[int, list[int]] = {}
        self._newest = -1

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._tickets

    def put(self, pages: Sequence[int], ticket: int) -> None:
        """Copy pages out under a ticket, unless that was tried before. Tickets ascend; there must be room."""
        if ticket <= self._newest:
            return
        self._newest = ticket
        places = self._free.take(len(pages))
        try:
            self._copy(self._near, pages, self._far, places)
        except BaseException:
            self._free.give_back(places)
            raise
        self._tickets[ticket] = places

    def take(self, ticket: int, pages: Sequence[int]) -> None:
        """Copy what lies under a ticket into pages, and forget the ticket."""
        places = self._tickets.pop(ticket)
        try:
            self._copy(self._far, places, self._near, pages)
        finally:
            self._free.give_back(places)

    def drop(self, ticket: int) -> None:
        """Forget a ticket; one that is not known, because its copy failed, is no error."""
        self._free.give_back(self._tickets.pop(ticket, []))

    def _copy(
        self, sources: Sequence[Tensor], from_: Sequence[int], targets: Sequence[Tensor], to: Sequence[int]
    ) -> None:
        # Slices of one block are contiguous on both sides: no copy of the copy is made where memory is short.
        for source, target in zip(sources, targets, strict=True):
            for first, second, count in _common_runs(from_, to):
                for block in range(len(source)):
                    target[block, second : second + count].copy_(
                        source[block, first : first + count], non_blocking=True
                    )


def _common_runs(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut two lists of equal length into stretches that ascend by one in both: (first left, first right, count)."""
    start = 0
    for end in range(1, len(left) + 1):
        goes_on = end < len(left) and left[end] == left[end - 1] + 1 and right[end] == right[end - 1] + 1
        if not goes_on:
            yield left[start], right[start], end - start
            start = end


def _lock(tensor: Tensor) -> None:
    """Lock a host tensor's memory: torch's own locked memory comes in powers of two, up to twice what was asked for."""
    torch.cuda.check_error(_cuda_runtime().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))


def _unlock(tensor: Tensor) -> None:
    _cuda_runtime().cudaHostUnregister(tensor.data_ptr())


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
