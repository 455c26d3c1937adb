from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from split_llama.errors import UsageError
from training.compute.aggregate import Clipped, Contribution, Rule, combine
from training.compute.averaging import average
from training.job_config import JobConfig


def entry(client: str, targets: int, *values: float, samples: int = 1) -> Contribution:
    """A contribution whose *mean* gradient is `values`."""
    tensor = torch.tensor(values) * targets
    return Contribution(client, targets, samples, {"w": tensor[:1].clone(), "v": tensor[1:].clone()})


def values(grads: dict[str, Tensor]) -> list[float]:
    return [*grads["w"].tolist(), *grads["v"].tolist()]


def test_tokens_weigh_clients_by_their_targets() -> None:
    combined = combine([entry("a", 1, 1.0, 0.0), entry("b", 3, 5.0, 4.0)], Rule())
    assert values(combined.grads) == pytest.approx([4.0, 3.0])
    assert (combined.targets, combined.clipped, combined.dropped) == (4, (), ())


def test_the_papers_sum_grows_with_the_clients() -> None:
    assert values(combine([entry("a", 1, 1.0, 0.0), entry("b", 3, 5.0, 4.0)], Rule("paper-sum")).grads) == [6.0, 4.0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.floats(-9, 9, width=16)] * 2), min_size=1, max_size=9),
    trim=st.sampled_from([0.1, 0.2, 0.34, 0.49]),
)
def test_median_and_trimmed_mean_are_those_of_each_coordinate(rows: list[tuple[float, float]], trim: float) -> None:
    entries = [entry(str(index), index + 1, *row) for index, row in enumerate(rows)]
    columns = [sorted(column) for column in zip(*rows, strict=True)]
    median = combine(entries, Rule("median"))
    assert values(median.grads) == pytest.approx([statistics.median(column) for column in columns], abs=1e-4)
    cut = int(trim * len(rows))
    trimmed = combine(entries, Rule("trimmed-mean", trim))
    expected = [statistics.fmean(column[cut : len(rows) - cut]) for column in columns]
    assert values(trimmed.grads) == pytest.approx(expected, abs=1e-4)


def test_one_hostile_client_does_not_move_the_median() -> None:
    honest = [entry(name, 5, 1.0, 1.0) for name in "abcd"]
    for rule in (Rule("median"), Rule("trimmed-mean", 0.2)):
        assert values(combine([*honest, entry("evil", 5, -1e6, 1e6)], rule).grads) == pytest.approx([1.0, 1.0])


def test_a_client_with_a_long_gradient_is_clipped_and_named() -> None:
    combined = combine([entry("a", 2, 3.0, 4.0), entry("b", 2, 3000.0, 4000.0)], Rule(max_norm=10.0))
    assert combined.clipped == (Clipped("b", 5000.0),)
    assert values(combined.grads) == pytest.approx([(3 + 6) / 2, (4 + 8) / 2])


def test_clipping_does_not_change_what_the_client_sent() -> None:
    sent = entry("b", 2, 30.0, 40.0)
    before = values(dict(sent.grads))
    combine([sent], Rule(max_norm=1.0))
    combine([sent, sent], Rule())
    assert values(dict(sent.grads)) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["tokens", "paper-sum", "median", "trimmed-mean"])
def test_what_is_not_finite_is_left_out_and_named(kind: str, bad: float) -> None:
    combined = combine([entry("a", 2, 1.0, 2.0), entry("b", 2, 1.0, bad)], Rule(kind, max_norm=100.0))
    assert combined.dropped == ("b",)
    assert combined.targets == 2
    assert values(combined.grads) == pytest.approx([1.0, 2.0])


def test_large_but_finite_gradients_are_clipped_not_dropped() -> None:
    combined = combine([entry("a", 1, 3e25, 4e25)], Rule(max_norm=1.0))
    assert combined.dropped == ()
    assert values(combined.grads) == pytest.approx([0.6, 0.8])


def test_no_tokens_add_nothing_and_nobody_gives_an_empty_gradient() -> None:
    combined = combine([entry("a", 2, 1.0, 2.0), entry("b", 0, 0.0, 0.0)], Rule("median"))
    assert values(combined.grads) == [1.0, 2.0]
    nobody = combine([entry("b", 0, 0.0, 0.0), entry("c", 2, float("nan"), 0.0)], Rule())
    assert (nobody.grads, nobody.targets, nobody.dropped) == ({}, 0, ("c",))
    assert combine([], Rule()).grads == {}


def test_a_jobs_rule() -> None:
    assert Rule.of(JobConfig()) == Rule("tokens", 0.2, None)
    assert Rule.of(JobConfig(weighting="paper-sum", client_max_grad_norm=2.0)) == Rule("paper-sum", 0.2, 2.0)
    assert Rule.of(JobConfig(aggregation="trimmed-mean", trim=0.3)) == Rule("trimmed-mean", 0.3, None)
    with pytest.raises(UsageError, match="tokens, paper-sum"):
        Rule("mode")


def test_averages_are_weighted_by_shares() -> None:
    sets = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 6.0])}]
    assert average(sets, [1, 3])["w"].tolist() == [4.0, 5.0]
    assert average(sets, [0, 2])["w"].tolist() == [5.0, 6.0]
    assert sets[0]["w"].tolist() == [1.0, 2.0]
    leaf = {"w": torch.ones(2, requires_grad=True)}
    assert not average([leaf], [1])["w"].requires_grad


@pytest.mark.parametrize("shares", [[0, 0], [1], [-1, 2], [float("nan"), 1], [float("inf"), 1]], ids=str)
def test_shares_that_make_no_average_are_refused(shares: list[float]) -> None:
    with pytest.raises(UsageError, match="a share of at least 0"):
        average([{"w": torch.ones(1)}, {"w": torch.ones(1)}], shares)


def test_sets_of_other_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="differ in their names"):
        average([{"w": torch.ones(1)}, {"v": torch.ones(1)}], [1, 1])
    with pytest.raises(UsageError):
        average([], [])


def test_a_robust_average_of_sets_does_not_follow_one_of_them() -> None:
    sets = [{"w": torch.tensor([value])} for value in (1.0, 1.2, 0.9, 1000.0)]
    assert average(sets, [1, 1, 1, 1])["w"].item() > 200
    assert average(sets, [1, 1, 1, 10**9], Rule("median"))["w"].item() == pytest.approx(1.1)
    assert average(sets, [1, 1, 1, 1], Rule("trimmed-mean", trim=0.25))["w"].item() == pytest.approx(1.1)


def test_a_gradient_too_large_for_the_moments_is_left_out_and_named() -> None:
    ordinary = Contribution("fine", 1, 1, {"w": torch.ones(2)})
    huge = Contribution("huge", 1, 1, {"w": torch.full((2,), 1e25)})
    combined = combine([ordinary, huge], Rule())
    assert combined.dropped == ("huge",)
    assert combined.grads["w"].tolist() == [1.0, 1.0]
