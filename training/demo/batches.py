"""Batches of whole documents of about the same length, right-padded, so that position 0 is always BOS."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from training.demo.corpus import USUAL, Mix, documents
from training.demo.tokenizer import DocumentEncoder

_POOL_DOCUMENTS = 1000
_YES_NO_POOLS = range(22, 42)


@dataclass(frozen=True)
class Batch:
    """`ids` int64 [rows, length]; `weights` float32 [rows, length]: the loss weight of predicting that token."""

    ids: Tensor
    weights: Tensor

    @property
    def tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.ids.numel()


def pool(encoder: DocumentEncoder, seed: int, index: int, batch_tokens: int, context: int) -> Iterator[Batch]:
    """The batches of pool `index` (1000 documents), the same for the same arguments; at most `context` tokens a row."""
    # Lookups are learned sooner from small stories: nearly all at first, the usual share from pool 14 on.
    easy = max(USUAL.easy, 1.0 - index / 20)
    # Comparing a claim with a fact comes last, and takes practice once the facts are found.
    yes_no = 0.75 if index in _YES_NO_POOLS else USUAL.yes_no
    encoded = []
    # Pools of one run, and runs with other seeds, must not share documents.
    for document in islice(documents(seed * 1_000_003 + index, Mix(easy, yes_no)), _POOL_DOCUMENTS):
        ids, weights = encoder.encode(document)
        encoded.append((ids[:context], weights[:context]))
    encoded.sort(key=lambda pair: len(pair[0]))
    groups: list[list[tuple[list[int], list[float]]]] = [[]]
    for pair in encoded:
        if (len(groups[-1]) + 1) * len(pair[0]) > batch_tokens and groups[-1]:
            groups.append([])
        groups[-1].append(pair)
    random.Random(index).shuffle(groups)
    for group in groups:
        yield _pad(group)


def _pad(group: list[tuple[list[int], list[float]]]) -> Batch:
    length = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), length, dtype=torch.int64)
    weights = torch.zeros(len(group), length)
    for row, (row_ids, row_weights) in enumerate(group):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
    return Batch(ids, weights)
