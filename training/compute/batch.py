"""A batch of texts with the tokens that are to be learned: ragged, as everything here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import UsageError
from training.compute.ragged import Ragged

NO_TARGET = -100


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Token ids and labels of sequences back to back, int64 `[N]`.

    `labels` stand beside the tokens they equal, as transformers wants them, with -100 where nothing is learned: the row
    before a label predicts it, and the first label of a sequence has no such row.
    """

    ragged: Ragged
    token_ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Batch:
        """Put sequences together. Raises `UsageError` where labels do not fit the tokens."""
        lengths = tuple(len(ids) for ids in token_ids)
        if lengths != tuple(len(row) for row in labels):
            raise UsageError(
                f"every token has a label, -100 for none; got {lengths} tokens and "
                f"{tuple(len(row) for row in labels)} labels"
            )
        flat_ids = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64)
        flat_labels = torch.tensor([label for row in labels for label in row], dtype=torch.int64)
        return cls(Ragged(lengths), flat_ids, flat_labels)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Give the rows that have a target, `[T]`, and the token that each of them is to predict, `[T]`."""
        wanted = torch.full_like(self.labels, NO_TARGET)
        wanted[:-1] = self.labels[1:]
        # What follows a sequence's last row is another sequence.
        wanted[[start - 1 for start in self.ragged.starts[1:]]] = NO_TARGET
        rows = (wanted != NO_TARGET).nonzero().flatten()
        return rows, wanted[rows]

    @property
    def target_count(self) -> int:
        """How many tokens are learned."""
        return len(self.targets()[0])
