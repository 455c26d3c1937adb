"""Sequences of different lengths back to back, and causal attention over them that can be differentiated.

Shapes as in `split_llama.layers`: N rows, H query heads, G key-value heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from split_llama.errors import UsageError

# A sequence shares a padded batch with the next longer one only if it is at least so much of it, so that at most
# half of what attention computes is padding.
SHARE_FROM = 0.5


@dataclass(frozen=True, slots=True)
class Ragged:
    """The lengths of sequences that lie back to back. Raises `UsageError` for a length below 1."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.lengths):
            raise UsageError(f"every sequence of a batch needs at least one token; got the lengths {self.lengths}")

    @property
    def rows(self) -> int:
        """How many rows all sequences have together."""
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each sequence."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @property
    def padded_rows(self) -> int:
        """How many rows attention computes for these, padding counted."""
        return sum(len(alike) * self.lengths[alike[0]] for alike in self.alike())

    def alike(self) -> list[list[int]]:
        """Put the numbers of sequences that are padded to one length together, the longest first."""
        members: list[list[int]] = []
        for index in sorted(range(len(self.lengths)), key=lambda index: -self.lengths[index]):
            if not members or self.lengths[index] < SHARE_FROM * self.lengths[members[-1][0]]:
                members.append([])
            members[-1].append(index)
        return members

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Give each row's position in its own sequence: int64 `[rows]`."""
        if not self.lengths:
            return torch.empty(0, dtype=torch.int64, device=device)
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    """Sequences of similar length, padded on the right to the longest: what causal rows cannot see.

    `rows` `[S, L]` are the row numbers; a padded place repeats its sequence's last row, so there is no garbage
    anywhere. `kept` are the places of `[S * L]` that are no padding, in the order of their rows.
    """

    rows: Tensor
    kept: Tensor

    @property
    def length(self) -> int:
        return self.rows.shape[1]


class RaggedAttention:
    """Attention of a training pass (`BlockAttention`): every row sees its own sequence up to itself, no cache.

    Padding exists in here only. Windows are those of the model's blocks; a window no shorter than the longest
    sequence costs nothing.
    """

    def __init__(self, ragged: Ragged, windows: Sequence[int], device: torch.device) -> None:
        self._windows = tuple(windows)
        self._sequences = len(ragged.lengths)
        self._even = len(set(ragged.lengths)) == 1
        self._buckets = [] if self._even else [_bucket(ragged, alike, device) for alike in ragged.alike()]
        # Where each row of the batch lies in the buckets' results, one after the other.
        order = torch.cat([bucket.rows.flatten()[bucket.kept] for bucket in self._buckets]) if self._buckets else None
        self._back = None if order is None else torch.argsort(order)
        lengths = {bucket.length for bucket in self._buckets} or {max(ragged.lengths, default=0)}
        self._bands = {
            (window, length): _band(window, length, device)
            for window in set(self._windows)
            for length in lengths
            if 0 < window < length
        }

    def __call__(self, block: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:  # noqa: N803
        """Give the attention output `[N, H, K]`."""
        window = self._windows[block]
        if not len(q_NHK):
            return q_NHK
        if self._even:
            batched = (x.view(self._sequences, -1, *x.shape[1:]) for x in (q_NHK, k_NGK, v_NGK))
            return self._attend(window, *batched).flatten(0, 1)
        parts = []
        for bucket in self._buckets:
            padded = (x[bucket.rows] for x in (q_NHK, k_NGK, v_NGK))
            parts.append(self._attend(window, *padded).flatten(0, 1)[bucket.kept])
        return torch.cat(parts)[self._back]

    def _attend(self, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of sequences of one length: `[S, L, heads, K]` each."""
        band = self._bands.get((window, q.shape[1]))
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=band, is_causal=band is None, enable_gqa=True
        )
        return out.transpose(1, 2)


def _bucket(ragged: Ragged, indices: Sequence[int], device: torch.device) -> _Bucket:
    starts = torch.tensor([ragged.starts[index] for index in indices], device=device)[:, None]
    lengths = torch.tensor([ragged.lengths[index] for index in indices], device=device)[:, None]
    places = torch.arange(max(ragged.lengths[index] for index in indices), device=device)
    kept = (places < lengths).flatten().nonzero().flatten()
    return _Bucket(rows=starts + torch.minimum(places, lengths - 1), kept=kept)


def _band(window: int, length: int, device: torch.device) -> Tensor:
    """Give the mask `[L, L]` of a sliding window: a row sees itself and the `window - 1` before it."""
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)
