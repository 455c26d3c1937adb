"""Sampling against transformers' logits processors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edge_client.sampling import Sampler, SamplingParams, penalise, warp
from split_llama.errors import UsageError
from split_llama.generation_config import GenerationDefaults

VOCAB = 50


def oracle(scores: Tensor, seen: list[int], params: SamplingParams) -> Tensor:
    """The list that transformers' `generate` builds, in its order."""
    steps: list[Any] = []
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p=params.top_p))
    if params.min_p > 0:
        steps.append(MinPLogitsWarper(min_p=params.min_p))
    result: Tensor = LogitsProcessorList(steps)(torch.tensor([seen]), scores[None])[0]
    return result


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 49, 50, 500]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    penalty=st.sampled_from([0.8, 1.0, 1.3]),
    seen=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
)
def test_the_same_scores_as_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seen: list[int]
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    params = SamplingParams(temperature, top_p, top_k, min_p, penalty)
    ours = warp(penalise(logits, seen, penalty), params)
    assert torch.equal(ours, oracle(logits, seen, params))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    frequency=st.sampled_from([-1.5, 0.0, 0.7]),
    presence=st.sampled_from([-2.0, 0.0, 1.1]),
    bias=st.dictionaries(st.integers(0, VOCAB + 5), st.floats(-100, 100, width=32), max_size=4),
)
def test_penalties_by_count_and_bias_follow_openais_formula(
    seed: int, frequency: float, presence: float, bias: dict[int, float]
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j]; c counts the answer's tokens, not the prompt's."""
    params = SamplingParams(
        frequency_penalty=frequency, presence_penalty=presence, logit_bias=tuple(sorted(bias.items()))
    )
    sampler = Sampler(params, prompt_ids=range(VOCAB))
    generator = torch.Generator().manual_seed(seed)
    counts = [0] * VOCAB
    for _ in range(12):
        logits = torch.randn(VOCAB, generator=generator)
        expected = [
            logits[j].double() - counts[j] * frequency - (counts[j] > 0) * presence + bias.get(j, 0.0)
            for j in range(VOCAB)
        ]
        token = sampler.choose(logits)
        assert expected[token] >= max(expected) - 1e-5
        counts[token] += 1


def test_a_vanishing_temperature_is_greedy() -> None:
    """Dividing by it would overflow, and a draw from what is no number stops the whole batch."""
    logits = torch.tensor([30.0, 29.0, -4.0])
    assert [Sampler(SamplingParams(temperature=1e-40), []).choose(logits) for _ in range(20)] == [0] * 20


def test_greedy_takes_the_best_after_the_penalty() -> None:
    logits = torch.tensor([3.0, 2.9, -1.0])
    assert Sampler(SamplingParams(), [0]).choose(logits) == 0
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), [0])
    assert sampler.choose(logits) == 1
    assert sampler.choose(logits) == 0, "the chosen token counts as seen too"


def test_a_seed_repeats_the_draws_and_no_seed_does_not() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), [])
    counts = Counter(sampler.choose(logits) for _ in range(3000))
    assert counts[0] / 3000 == pytest.approx(0.6, abs=0.05)
    assert counts[2] / 3000 == pytest.approx(0.1, abs=0.03)


def test_the_checkpoint_fills_what_the_user_left_open() -> None:
    sampling = GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    assert SamplingParams.resolve(sampling) == SamplingParams(0.6, 0.9, 20, 0.0, 1.1)
    assert SamplingParams.resolve(sampling, temperature=0.0, top_k=0).temperature == 0
    greedy = GenerationDefaults(do_sample=False, temperature=0.6, top_p=0.9)
    assert SamplingParams.resolve(greedy) == SamplingParams()
    assert SamplingParams.resolve(greedy, temperature=0.8, seed=3) == SamplingParams(0.8, seed=3)
    assert SamplingParams.resolve(GenerationDefaults(do_sample=True)).temperature == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": 2.5},
        {"presence_penalty": float("nan")},
        {"logit_bias": ((3, 101.0),)},
        {"logit_bias": ((-1, 1.0),)},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)
