"""What `generate` and `forward` give, named as in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.generate import GenerationStats
from edge_client.sampling import SamplingParams, penalise, warp
from edge_client.turn import FinishReason


@dataclass(frozen=True, slots=True)
class CausalOutput:
    """`logits [batch, n, vocab]` float32; rows of padding are zero."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class GenerateOutput:
    """Sequences and, where asked for, what they were chosen from.

    `sequences [rows, n + new]` holds prompts and answers, padded on both sides. `logits` and `scores` have one
    `[rows, vocab]` per step: the model's own, and those after penalty, temperature and the rest; NaN for a row whose
    answer was over. `hidden_states[step][-1]` is the final norm's output, for the prompt's positions in step 0 and for
    one token later on, as in transformers; the layers between are not here. `stats` and `finish_reasons` are per row.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    hidden_states: tuple[tuple[Tensor], ...] | None
    stats: tuple[GenerationStats, ...]
    finish_reasons: tuple[FinishReason | None, ...]


class LogitsRecorder:
    """Keeps the logits of each token of one answer. The turn takes it for a constraint that allows everything."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.finished = False

    def mask(self, logits: Tensor) -> Tensor:
        """Keep a copy."""
        self.logits.append(logits.float().clone())
        return logits

    def take(self, token: int) -> None:
        """Nothing depends on the token."""

    def scores(self, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingParams) -> list[Tensor]:
        """Give what each of `tokens` was chosen from."""
        seen = set(prompt)
        scores = []
        for logits, token in zip(self.logits, tokens, strict=True):
            each = penalise(logits, seen, sampling.repetition_penalty)
            scores.append(warp(each, sampling) if sampling.temperature > 0 else each)
            seen.add(token)
        return scores


def by_step(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Turn `[vocab]` per row and step into `[rows, vocab]` per step; NaN where a row has no such step."""
    steps = max(len(row) for row in rows)
    missing = torch.full_like(rows[0][0], torch.nan)
    return tuple(torch.stack([row[step] if step < len(row) else missing for row in rows]) for step in range(steps))


def states_by_step(states: Tensor, width: int) -> tuple[tuple[Tensor], ...]:
    """Cut final states `[rows, n, d]` as transformers does: the prompt's `width` ones, then one position at a time."""
    later = [(states[:, at : at + 1],) for at in range(width, states.shape[1])]
    return ((states[:, :width],), *later)
