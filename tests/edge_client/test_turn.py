"""A turn beside its sampling: log-probabilities, scoring a prompt, and holding to a constraint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.sampling import SamplingParams
from edge_client.turn import GenerationParams, TokenLogprobs, Turn

VOCAB = 40


def make_turn(prompt: list[int], room: int = 100, **params: Any) -> Turn:
    return Turn(GenerationParams(**params), prompt, room, None)


def some_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 5


def test_logprobs_are_the_models_own_before_penalty_temperature_and_bias() -> None:
    sampling = SamplingParams(
        temperature=1.3, seed=1, repetition_penalty=1.5, presence_penalty=2.0, logit_bias=((7, 50.0),)
    )
    turn = make_turn([1, 2], sampling=sampling, logprobs=3, max_new_tokens=10)
    rows = some_logits(10)
    for row in rows:
        turn.choose(row)
    events = turn.take_events()
    assert 7 in turn.tokens
    for row, event in zip(rows, events, strict=True):
        expected = torch.log_softmax(row.double(), -1)
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(float(expected[event.token]), abs=1e-5)
        best = expected.topk(3)
        assert [token for token, _ in event.logprobs.top] == best.indices.tolist()
        assert [logprob for _, logprob in event.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_likeliest_token_has_exactly_the_value_of_its_alternative() -> None:
    """lm-eval tells greedy from not greedy by comparing the two for equality."""
    turn = make_turn([1], logprobs=1, max_new_tokens=50)
    for row in some_logits(50, seed=3):
        turn.choose(row)
    for event in turn.take_events():
        assert event.logprobs is not None
        assert event.logprobs.top == ((event.token, event.logprobs.logprob),)


def test_without_a_wish_there_are_none() -> None:
    turn = make_turn([1], max_new_tokens=2)
    turn.choose(some_logits(1)[0])
    assert turn.take_events()[0].logprobs is None
    assert not turn.wants_prompt_logits


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [8, 1]])
@pytest.mark.parametrize("limit", [0, 1])
def test_a_prompt_is_scored_chunk_by_chunk(chunks: list[int], limit: int) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    logits = some_logits(len(prompt), seed=5)
    turn = make_turn(prompt, max_new_tokens=limit, prompt_logprobs=2)
    assert turn.wants_prompt_logits
    first = 0
    for size in chunks:
        assert turn.finish_reason is None
        turn.see_prompt(first, logits[first : first + size])
        first += size
    expected = torch.log_softmax(logits.double(), -1)
    assert [entry.logprob for entry in turn.prompt_logprobs] == pytest.approx(
        [float(expected[at, token]) for at, token in enumerate(prompt[1:])], abs=1e-5
    )
    assert [entry.top[0][0] for entry in turn.prompt_logprobs] == logits[:-1].argmax(-1).tolist()
    assert turn.finish_reason == ("length" if limit == 0 else None)
    if limit:
        assert turn.choose(logits[-1]) == ()
        assert turn.tokens == [int(logits[-1].argmax())]


def test_no_tokens_and_no_scores_leave_nothing_to_do() -> None:
    turn = make_turn([1, 2, 3], max_new_tokens=0)
    assert turn.finish_reason == "length"
    assert turn.prompt_logprobs == []


class Counting:
    """A constraint that wants the tokens 5, 6, 7, and is then complete."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    @property
    def finished(self) -> bool:
        return len(self.taken) == 3

    def mask(self, logits: Tensor) -> Tensor:
        scores = torch.full_like(logits, -torch.inf)
        wanted = 5 + len(self.taken)
        scores[wanted] = logits[wanted]
        return scores

    def take(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.7])
def test_a_constraint_is_followed_and_ends_the_answer(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, top_k=4, top_p=0.5, min_p=0.1, seed=2, frequency_penalty=1.0)
    turn = make_turn([1], sampling=sampling, constraint=Counting, logprobs=1)
    fed = [turn.choose(row) for row in some_logits(3, seed=9)]
    assert turn.tokens == [5, 6, 7]
    assert fed == [(5,), (6,), ()]
    assert turn.finish_reason == "stop"
    assert all(isinstance(event.logprobs, TokenLogprobs) for event in turn.take_events())


def test_a_constrained_answer_that_is_cut_says_so() -> None:
    turn = make_turn([1], constraint=Counting, max_new_tokens=2)
    for row in some_logits(2):
        turn.choose(row)
    assert turn.finish_reason == "length"
    # Complete with its last possible token, it is complete.
    turn = make_turn([1], constraint=Counting, max_new_tokens=3)
    for row in some_logits(3):
        turn.choose(row)
    assert turn.finish_reason == "stop"


def test_each_turn_has_a_constraint_of_its_own() -> None:
    params = GenerationParams(constraint=Counting)
    one, other = Turn(params, [1], 100, None), Turn(params, [1], 100, None)
    one.choose(some_logits(1)[0])
    other.choose(some_logits(1)[0])
    assert one.tokens == other.tokens == [5]
