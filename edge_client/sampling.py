"""Choosing the next token: the processors of transformers' `generate`, in its order, on float32 logits `[vocab]`.

Repetition penalty first (Keskar et al. 2019), then temperature, top-k, top-p (Holtzman et al. 2019), min-p (Nguyen et
al. 2024), then one draw. Temperature 0 is greedy: the penalty still counts, the rest does not.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import UsageError
from split_llama.generation_config import GenerationDefaults


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. 0 switches top_k and min_p off, 1 switches top_p and repetition_penalty off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be from 0 (off) to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    @classmethod
    def resolve(
        cls,
        defaults: GenerationDefaults,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> SamplingParams:
        """Fill what the user left open from the checkpoint: its sampling values where it samples, else greedy."""
        sampled = defaults if defaults.do_sample else GenerationDefaults()
        usual_temperature = _first(sampled.temperature, 1.0) if defaults.do_sample else 0.0
        return cls(
            temperature=_first(temperature, usual_temperature),
            top_p=_first(top_p, sampled.top_p, 1.0),
            top_k=int(_first(top_k, sampled.top_k, 0)),
            min_p=_first(min_p, sampled.min_p, 0.0),
            repetition_penalty=_first(repetition_penalty, defaults.repetition_penalty, 1.0),
            seed=seed,
        )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


class Sampler:
    """Samples one sequence. It remembers which tokens were seen, for the penalty, and owns its random generator."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self.params = params
        self._seen = set(prompt_ids)
        self._generator = torch.Generator()
        self._generator.manual_seed(params.seed if params.seed is not None else secrets.randbits(63))

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from `logits [vocab]` float32 and remember it."""
        scores = penalise(logits.cpu(), self._seen, self.params.repetition_penalty)
        if self.params.temperature == 0:
            token = int(scores.argmax())
        else:
            probabilities = warp(scores, self.params).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._seen.add(token)
        return token


def penalise(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens seen before."""
    if penalty == 1.0:
        return logits
    ids = torch.tensor(sorted(seen), dtype=torch.int64)
    scores = logits.clone()
    picked = scores[ids]
    scores[ids] = torch.where(picked < 0, picked * penalty, picked / penalty)
    return scores


def warp(scores: Tensor, params: SamplingParams) -> Tensor:
    """Apply temperature, top-k, top-p and min-p; tokens that fall out become minus infinity."""
    scores = scores / params.temperature
    if 0 < params.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1.0:
        ordered, order = scores.sort()
        # From the least likely up: what fits into 1 - top_p falls out, the most likely token never does.
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        drop[-1] = False
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -torch.inf)
    if params.min_p > 0:
        probabilities = scores.softmax(-1)
        drop = probabilities < params.min_p * probabilities.max()
        drop[scores.argmax()] = False
        scores = scores.masked_fill(drop, -torch.inf)
    return scores
