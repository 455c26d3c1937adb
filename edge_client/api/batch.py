"""Batches in transformers' manner (padded on the left, with a mask), and the bare rows that sessions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from split_llama.errors import UsageError

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of token ids without their padding; `width` is the longest row's length with it."""

    rows: tuple[tuple[int, ...], ...]
    width: int

    @classmethod
    def read(
        cls, input_ids: Ids, attention_mask: Any = None, *, pad: int | None = None, ends: Sequence[int] = ()
    ) -> Batch:
        """Read ids `[batch, n]` (one row may come without the batch), or lists of any lengths.

        Without a mask the leading `pad` tokens are padding, unless `pad` is one of the `ends` too: as in transformers.
        Raises `UsageError`.
        """
        rows = _rows(input_ids, "input_ids")
        if attention_mask is not None:
            masks = _rows(attention_mask, "attention_mask")
            if [len(mask) for mask in masks] != [len(row) for row in rows]:
                raise UsageError("attention_mask must have a 0 or 1 for each of the input_ids")
            bare = [_unpadded(row, mask) for row, mask in zip(rows, masks, strict=True)]
        else:
            skipped = pad if pad is not None and pad not in ends else None
            bare = [_without_leading(row, skipped) for row in rows]
        if not bare or not all(bare):
            raise UsageError("each row of input_ids needs at least one token that is no padding")
        return cls(tuple(bare), max(len(row) for row in rows))

    def ids(self, pad: int) -> Tensor:
        """Give the rows as one tensor `[batch, width]`, padded on the left."""
        return torch.tensor([[pad] * (self.width - len(row)) + list(row) for row in self.rows], dtype=torch.int64)

    def mask(self) -> Tensor:
        """Give the mask `[batch, width]`: 1 for a token, 0 for padding."""
        return torch.tensor([[0] * (self.width - len(row)) + [1] * len(row) for row in self.rows], dtype=torch.int64)

    def stack(self, states: Sequence[Tensor]) -> Tensor:
        """Join one `[n, x]` per row into `[batch, width, x]`, zeros at the padding."""
        joined = torch.zeros(len(states), self.width, states[0].shape[-1], dtype=states[0].dtype)
        for row, each in zip(joined, states, strict=True):
            row[self.width - len(each) :] = each
        return joined


def _rows(values: Any, name: str) -> list[list[int]]:
    given = values.tolist() if hasattr(values, "tolist") else list(values)
    rows = [list(row) if isinstance(row, list | tuple) else row for row in given]
    if rows and all(isinstance(row, int) for row in rows):
        rows = [rows]
    if not all(isinstance(row, list) and all(type(value) in (int, bool) for value in row) for row in rows):
        raise UsageError(f"{name} must be whole numbers [batch, n]: a tensor of integers, or a list of lists")
    return rows


def _unpadded(row: list[int], mask: list[int]) -> tuple[int, ...]:
    start = mask.index(1) if 1 in mask else len(mask)
    if not all(mask[start:]):
        raise UsageError("the attention_mask has a 0 behind a 1: pad on the left (padding_side='left')")
    return tuple(row[start:])


def _without_leading(row: list[int], pad: int | None) -> tuple[int, ...]:
    start = 0
    while start < len(row) and row[start] == pad:
        start += 1
    return tuple(row[start:])
