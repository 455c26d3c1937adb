"""What is fed to learn likelihoods: nothing twice, nothing missing; and sums that no cutting changes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.evaluate.feeds import Feeds, Likelihood, first_target
from training.tasks.examples import IGNORED, Sample

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=4)


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample((*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


def logits_of(ids: tuple[int, ...]) -> torch.Tensor:
    """A language model of no use: each row depends on all tokens up to it."""
    rows = [
        torch.randn(5, generator=torch.Generator().manual_seed(hash(ids[: at + 1]) % 2**31)) for at in range(len(ids))
    ]
    return torch.stack(rows)


def naive(of: Sample) -> float:
    logprobs = torch.log_softmax(logits_of(of.token_ids).double(), dim=-1)
    return sum(float(logprobs[at - 1, label]) for at, label in enumerate(of.labels) if at and label != IGNORED)


@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=6))
def test_every_sample_is_covered_by_a_feed_and_no_feed_by_another(prompt: list[int], answers: list[list[int]]) -> None:
    samples = [sample(prompt, answer) for answer in answers]
    plan = Feeds.of(samples)
    for each, at in zip(samples, plan.feed_of, strict=True):
        assert plan.sequences[at][: len(each.token_ids) - 1] == each.token_ids[:-1]
    for feed in plan.sequences:
        assert sum(other[: len(feed)] == feed for other in plan.sequences) == 1
        assert feed[: plan.trunk] == plan.sequences[0][: plan.trunk]
    assert plan.trunk <= min(map(first_target, samples))


@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=6), st.integers(1, 4))
def test_the_sums_are_those_of_each_sample_alone_however_the_logits_come(
    prompt: list[int], answers: list[list[int]], piece: int
) -> None:
    samples = [sample(prompt, answer) for answer in answers]
    plan = Feeds.of(samples)
    for at, ids in enumerate(plan.sequences):
        wanted = plan.wants(samples, at)
        likelihood = Likelihood(wanted)
        logits = logits_of(ids)
        # What lies before the last token of the trunk is fed before anybody looks.
        for first in range(max(0, plan.trunk - 1), len(ids), piece):
            likelihood.see(first, logits[first : first + piece])
        for total, each in zip(likelihood.totals, wanted, strict=True):
            assert abs(total - naive(each)) < 1e-9


def test_choices_behind_a_prompt_share_it() -> None:
    samples = [sample([1, 2, 3], [4, 9]), sample([1, 2, 3], [5, 9]), sample([1, 2, 3], [4, 7, 9])]
    plan = Feeds.of(samples)
    assert plan.trunk == 3
    assert sorted(plan.sequences) == [(1, 2, 3, 4, 7), (1, 2, 3, 5)]


def test_choices_of_one_token_need_the_prompt_alone() -> None:
    plan = Feeds.of([sample([1, 2, 3], [4]), sample([1, 2, 3], [5])])
    assert plan.sequences == ((1, 2, 3),)
    assert plan.feed_of == (0, 0)
