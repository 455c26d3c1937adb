"""Vocabulary matching ("Hidden No More", arXiv 2505.18332): which token of the vocabulary, behind the text so far,
would have given this row?

Position by position every token is run through the public A behind what was recovered before it, and the one whose
state lies nearest to the row is taken: greedy, no beam, no language model. A mistake stays in the prefix, and the next
positions are matched behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.attacks.public import PublicModel

# So many candidates pass A at once: their scores and states stay small beside the weights.
CANDIDATES = 4096


class VocabularyMatching:
    """Runs the whole vocabulary through A for each row: V rows of A's work per token."""

    def __init__(self, public: PublicModel) -> None:
        self._public = public
        self._vocab = public.config.vocab_size

    @torch.inference_mode()
    def recover(self, rows: Tensor) -> list[int]:
        """Give the best match of each row of `rows [n, d]`, behind the matches before it."""
        behind = _Behind(self._public.config.sliding_windows)
        return [self._match(row, behind) for row in rows]

    def _match(self, row: Tensor, behind: _Behind) -> int:
        best, least, kept = 0, float("inf"), behind.candidate(0)
        for start in range(0, self._vocab, CANDIDATES):
            tokens = torch.arange(start, min(start + CANDIDATES, self._vocab))
            distances = (self._states(tokens, behind) - row).norm(dim=-1)
            nearest = int(distances.argmin())
            if float(distances[nearest]) < least:
                best, least, kept = start + nearest, float(distances[nearest]), behind.candidate(nearest)
        behind.extend(kept)
        return best

    def _states(self, tokens: Tensor, behind: _Behind) -> Tensor:
        """A's output `[n, d]` of each token, were it the next one."""
        states: Tensor = self._public.embedding(tokens)
        if self._public.p:
            segment = self._public.segment_a
            positions = torch.full((len(tokens),), behind.length)
            states = segment(segment.blocks, states, positions, behind)
        return states


class _Behind:
    """Attention of candidates that all stand at one position: each sees the prefix and itself, none another one.

    It keeps the prefix's keys and values, and those of the candidates of the last pass, by block.
    """

    def __init__(self, windows: tuple[int, ...]) -> None:
        self.length = 0
        self._windows = windows
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self._asked: dict[int, tuple[Tensor, Tensor]] = {}

    def candidate(self, index: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Give keys and values of one candidate of the last pass, by block."""
        return {block: (k[index : index + 1], v[index : index + 1]) for block, (k, v) in self._asked.items()}

    def extend(self, chosen: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Put a candidate behind the prefix."""
        for block, (k, v) in chosen.items():
            before = self._prefix.get(block)
            self._prefix[block] = (k, v) if before is None else (torch.cat((before[0], k)), torch.cat((before[1], v)))
        self.length += 1

    def __call__(self, block: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:  # noqa: N803
        """Give each candidate's attention output `[N, H, K]`."""
        self._asked[block] = (k_NGK, v_NGK)
        count, heads, width = q_NHK.shape
        groups = k_NGK.shape[1]
        queries = q_NHK.view(count, groups, heads // groups, width) / width**0.5
        scores = torch.einsum("ngrk,ngk->ngr", queries, k_NGK)[..., None]
        if block not in self._prefix:
            return v_NGK.repeat_interleave(heads // groups, dim=1)
        window = self._windows[block]
        # The candidate itself takes one place of the window.
        seen = slice(max(0, self.length + 1 - window) if window else 0, None)
        k_prefix, v_prefix = (each[seen] for each in self._prefix[block])
        shares = F.softmax(torch.cat((torch.einsum("ngrk,tgk->ngrt", queries, k_prefix), scores), dim=-1), dim=-1)
        out = torch.einsum("ngrt,tgk->ngrk", shares[..., :-1], v_prefix) + shares[..., -1:] * v_NGK[:, :, None]
        return out.reshape(count, heads, width)
