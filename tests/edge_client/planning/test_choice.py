"""Which prediction is recommended, and in what words."""

from __future__ import annotations

import dataclasses

import pytest

from edge_client.planning.choice import CODECS, recommend
from edge_client.planning.cost import Curve, Format, LinkSpeed, Measured, Prediction, ServerSpeed, Task, predict_all
from edge_client.planning.drafts import acceptance_for
from edge_client.planning.words import flags, reasons
from split_llama.config import BlockRange, Partition
from split_llama.errors import UsageError
from tests.edge_client.planning.test_cost import FLOAT32, simple

TASK = Task(64, 128, True)
GUESSES = (0, 2, 8)


def everything(measured: Measured) -> list[Prediction]:
    partitions = [Partition(p, q) for p in range(5) for q in range(5) if measured.model.allows(Partition(p, q))]
    return predict_all(measured, partitions, CODECS, GUESSES, TASK)


def hosting(measured: Measured, start: int, stop: int) -> Measured:
    return dataclasses.replace(measured, model=dataclasses.replace(measured.model, hosted=BlockRange(start, stop)))


def with_format(measured: Measured, format: Format, factor: float) -> Measured:
    device = measured.devices[0]
    other = dataclasses.replace(
        device, format=format, block=device.block.scaled(factor), head=device.head.scaled(factor)
    )
    return dataclasses.replace(measured, devices=(device, other))


def test_bare_embeddings_are_never_recommended() -> None:
    # A server so fast that every block here is a loss.
    measured = hosting(simple(round_trip=0.0), 0, 8)
    fast = dataclasses.replace(measured, server=ServerSpeed(6, Curve.of({1: 1e-6})))
    advice = recommend(everything(fast), None)
    assert advice.best.choice.partition == Partition(1, 1)
    assert advice.fastest.choice.partition.p > 0


def test_no_partition_with_a_block_in_front_is_refused() -> None:
    with pytest.raises(UsageError, match="never recommended"):
        recommend([one for one in everything(hosting(simple(), 0, 8)) if one.choice.partition.p == 0], None)


def test_a_block_more_here_must_be_worth_it() -> None:
    """A block takes 2 ms both here and there, and a little less here: not enough of a gain."""
    advice = recommend(everything(simple()), None)
    assert advice.best.choice.partition == Partition(1, 1)


def test_a_slow_server_gets_fewer_blocks() -> None:
    slow = dataclasses.replace(simple(round_trip=0.001), server=ServerSpeed(6, Curve.of({1: 0.6, 64: 0.7})))
    advice = recommend(everything(slow), None)
    assert advice.best.choice.partition.p + advice.best.choice.partition.q > 2
    assert "faster" in reasons(advice, slow, everything(slow))[0]


def test_coarse_numbers_must_be_worth_it() -> None:
    int8 = Format("float32", "int8")
    little, much = with_format(simple(), int8, 0.95), with_format(simple(round_trip=0.0001), int8, 0.05)
    assert recommend(everything(little), None).best.choice.format == FLOAT32
    assert recommend(everything(much), None).best.choice.format == int8


def test_guesses_that_fail_are_not_recommended() -> None:
    assert recommend(everything(simple(acceptance=0.0)), None).best.choice.guesses == 0
    assert recommend(everything(simple(acceptance=0.9)), None).best.choice.guesses > 0


def test_a_narrow_link_makes_bytes_count() -> None:
    narrow = dataclasses.replace(simple(), link=LinkSpeed(0.02, 2e3, 2e3))
    assert recommend(everything(narrow), None).best.choice.codec.label == "int8"


def test_what_does_not_fit_is_left_out() -> None:
    predictions = everything(simple())
    sizes = sorted({one.memory_bytes for one in predictions})
    advice = recommend(predictions, int(sizes[0] / 0.8) + 1)
    assert advice.best.memory_bytes == sizes[0]
    assert advice.too_large == sum(one.memory_bytes > sizes[0] for one in predictions)
    with pytest.raises(UsageError, match="at least"):
        recommend(predictions, sizes[0])


def test_words_name_every_part_of_the_choice() -> None:
    measured = simple()
    predictions = everything(measured)
    advice = recommend(predictions, None)
    text = " ".join(reasons(advice, measured, predictions))
    assert "p = 0" in text
    assert "no proof of privacy" in text
    assert "made up" in text  # where the acceptance comes from
    assert flags(advice.best.choice).startswith("--partition 1,1 --dtype float32 --codec ")


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_acceptance_is_read_off_the_tokens(acceptance: float) -> None:
    accepted = sum(acceptance**depth for depth in range(1, 9))
    assert acceptance_for(accepted, 8) == pytest.approx(acceptance, abs=1e-3)
