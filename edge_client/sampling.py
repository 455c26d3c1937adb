"""Choosing the next token: the processors of transformers' `generate`, in its order, on float32 logits `[vocab]`.

Repetition penalty first (Keskar et al. 2019), then temperature, top-k, top-p (Holtzman et al. 2019), min-p (Nguyen et
al. 2024), then one draw. Temperature 0 is greedy: the penalty still counts, the rest does not. What OpenAI's API has
besides comes after the repetition penalty: frequency and presence penalty, which count the answer's own tokens only,
and the bias of single tokens.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import UsageError
from split_llama.generation_config import GenerationDefaults

# Dividing by less overflows float32, and no second token would have a chance left anyway.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. 0 switches top_k, min_p, frequency_penalty and presence_penalty off, 1 switches top_p and
    repetition_penalty off. `logit_bias` holds pairs of token id and what is added to its logit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

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
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UsageError(f"{name} must be from -2 to 2 (0 is off), got {getattr(self, name)}")
        if not all(token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias):
            raise UsageError("logit_bias must give token ids a bias from -100 to 100 each")

    @property
    def has_counts(self) -> bool:
        """Say whether the answer's own tokens change what comes next, or single tokens have a bias."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)

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
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
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
            frequency_penalty=_first(frequency_penalty, 0.0),
            presence_penalty=_first(presence_penalty, 0.0),
            logit_bias=tuple(sorted((logit_bias or {}).items())),
        )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


class Sampler:
    """Samples one sequence. It remembers which tokens were seen, for the penalty, and owns its random generator."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self.params = params
        self._seen = set(prompt_ids)
        self._counts: Counter[int] | None = Counter() if params.has_counts else None
        self._generator = torch.Generator()
        self._generator.manual_seed(params.seed if params.seed is not None else secrets.randbits(63))

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from `logits [vocab]` float32 and remember it."""
        scores = penalise(logits.cpu(), self._seen, self.params.repetition_penalty)
        if self._counts is not None:
            scores = adjust(scores, self._counts, self.params)
        if self.params.temperature < GREEDY_BELOW:
            token = int(scores.argmax())
        else:
            probabilities = warp(scores, self.params).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._seen.add(token)
        if self._counts is not None:
            self._counts[token] += 1
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


def adjust(scores: Tensor, counts: Mapping[int, int], params: SamplingParams) -> Tensor:
    """Subtract what each token's `counts` in the answer so far cost it, and add the bias of single tokens."""
    scores = scores.clone()
    if counts:
        ids = torch.tensor(list(counts), dtype=torch.int64)
        often = torch.tensor([counts[token] for token in counts], dtype=scores.dtype)
        scores[ids] -= params.frequency_penalty * often + params.presence_penalty
    # A bias may name a token that the model does not have: it takes part in nothing.
    known = [(token, bias) for token, bias in params.logit_bias if token < scores.numel()]
    if known:
        scores[torch.tensor([token for token, _ in known])] += torch.tensor([bias for _, bias in known])
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
