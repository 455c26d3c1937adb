"""The cost model: what must hold for any measurements."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.generate import PREFILL_ROWS
from edge_client.planning.cost import (
    CHUNK_ROWS,
    Choice,
    Curve,
    DeviceSpeed,
    Drafting,
    Format,
    LinkSpeed,
    Measured,
    Model,
    Parts,
    ServerSpeed,
    Task,
    predict,
)
from split_llama.config import BlockRange, Partition
from split_llama.wire.codec import Codec

FLOAT32 = Format("float32")
SECONDS = st.floats(1e-6, 0.5)
CURVES = st.dictionaries(st.sampled_from([1, 4, 16, 64]), SECONDS, min_size=1).map(Curve.of)
RATES = st.one_of(st.floats(1e4, 1e10), st.just(math.inf))
BLOCKS = 8


@st.composite
def device_speeds(draw: st.DrawFn) -> DeviceSpeed:
    return DeviceSpeed(
        FLOAT32,
        *(draw(CURVES) for _ in range(5)),
        sampling=draw(SECONDS),
        overhead=draw(SECONDS),
        block_bytes=draw(st.integers(1, 10**9)),
        head_bytes=draw(st.integers(1, 10**9)),
    )


@st.composite
def measurements(draw: st.DrawFn) -> Measured:
    return Measured(
        Model(BLOCKS, 64, BlockRange(0, BLOCKS), 512, 128),
        (draw(device_speeds()),),
        LinkSpeed(draw(SECONDS), draw(RATES), draw(RATES)),
        ServerSpeed(6, draw(CURVES), draw(SECONDS), draw(SECONDS)),
        Drafting(draw(st.floats(0, 1)), draw(SECONDS), "made up"),
    )


PARTITIONS = st.sampled_from([Partition(p, q) for p in range(1, 4) for q in range(4)])
CHOICES = st.builds(Choice, PARTITIONS, st.just(FLOAT32), st.sampled_from(Codec), st.integers(0, 16))
TASKS = st.builds(Task, st.integers(1, 600), st.integers(1, 300), st.booleans())
NEARLY = 1 + 1e-9


def simple(round_trip: float = 0.02, acceptance: float = 0.5) -> Measured:
    def flat(seconds: float) -> Curve:
        return Curve.of({1: seconds, 64: seconds})

    device = DeviceSpeed(
        FLOAT32,
        block=flat(0.002),
        a=flat(0.0001),
        c=flat(0.0002),
        head=flat(0.003),
        codec=flat(0.0004),
        sampling=0.0005,
        overhead=0.0006,
        block_bytes=1000,
        head_bytes=300,
    )
    model = Model(BLOCKS, 64, BlockRange(1, BLOCKS - 1), 512, 128)
    server = ServerSpeed(6, flat(0.013), 0.001)
    return Measured(model, (device,), LinkSpeed(round_trip, 1e6, 2e6), server, Drafting(acceptance, 0.0007, "made up"))


def test_a_token_by_hand() -> None:
    one = predict(simple(), Choice(Partition(1, 1), FLOAT32, Codec.FP16, 0), Task(10, 5, True))
    message = 32 + 128
    assert one.parts == Parts(
        a=pytest.approx(0.0021),
        c=pytest.approx(0.0022),
        head=0.003,
        sampling=0.0005,
        drafting=0.0,
        codec=0.0004,
        wire=pytest.approx(message / 1e6 + message / 2e6),
        wait=0.02,
        server=pytest.approx(0.013),
        overhead=0.0006,
    )
    assert one.tokens_per_second == pytest.approx(1 / one.parts.total)
    assert (one.bytes_up, one.bytes_down) == (message, message)
    assert one.memory_bytes == 2 * 1000 + 300 + 2 * 128 * 512
    assert one.rows_released == 10 + 4


def test_guesses_by_hand() -> None:
    one = predict(simple(), Choice(Partition(1, 1), FLOAT32, Codec.FP16, 2), Task(10, 5, True))
    assert one.tokens_per_round == 1.75
    assert one.parts.wait == pytest.approx(0.02 / 1.75)
    assert one.parts.drafting == pytest.approx(2 * 0.0007 / 1.75)
    assert one.parts.sampling == pytest.approx(0.0005)
    assert one.rows_released == math.ceil(10 + 4 * 3 / 1.75)


def test_fewer_blocks_on_the_server_take_their_share() -> None:
    server = ServerSpeed(6, Curve.of({1: 0.013}), 0.001)
    assert server.at(1, 3) == pytest.approx(0.007)
    assert server.at(1, 6) == pytest.approx(0.013)


def test_a_long_prompt_waits_for_its_slowest_stage_only() -> None:
    def first(prompt: int) -> float:
        return predict(
            simple(), Choice(Partition(1, 1), FLOAT32, Codec.FP16, 0), Task(prompt, 1, False)
        ).first_token_seconds

    up = (32 + CHUNK_ROWS * 128) / 1e6  # slower than the edge and the server
    assert first(3 * CHUNK_ROWS) - first(2 * CHUNK_ROWS) == pytest.approx(up)


def test_chunks_are_those_of_the_edge() -> None:
    assert CHUNK_ROWS == PREFILL_ROWS


@given(CURVES, st.integers(1, 300), st.integers(0, 300))
def test_more_rows_never_take_less(curve: Curve, rows: int, more: int) -> None:
    assert 0 <= curve.at(rows) <= curve.at(rows + more) * NEARLY


@given(st.dictionaries(st.integers(1, 64), SECONDS, min_size=2))
def test_a_curve_goes_through_its_points(measured: dict[int, float]) -> None:
    curve = Curve.of(measured)
    for rows, seconds in measured.items():
        assert curve.at(rows) >= seconds * (1 - 1e-9)
    assert curve.at(min(measured)) == pytest.approx(measured[min(measured)])


@given(measurements(), CHOICES, TASKS, SECONDS)
def test_a_longer_way_is_never_faster(measured: Measured, choice: Choice, task: Task, more: float) -> None:
    far = dataclasses.replace(measured.link, round_trip=measured.link.round_trip + more)
    near, slow = predict(measured, choice, task), predict(dataclasses.replace(measured, link=far), choice, task)
    assert slow.tokens_per_second <= near.tokens_per_second * NEARLY
    assert slow.first_token_seconds >= near.first_token_seconds
    assert (slow.bytes_up, slow.rows_released, slow.memory_bytes) == (
        near.bytes_up,
        near.rows_released,
        near.memory_bytes,
    )


@given(measurements(), CHOICES, TASKS, st.floats(0.01, 1))
def test_less_bandwidth_is_never_faster(measured: Measured, choice: Choice, task: Task, share: float) -> None:
    narrow = dataclasses.replace(measured.link, up=measured.link.up * share, down=measured.link.down * share)
    fast, slow = predict(measured, choice, task), predict(dataclasses.replace(measured, link=narrow), choice, task)
    assert slow.parts.total >= fast.parts.total / NEARLY
    assert slow.first_token_seconds >= fast.first_token_seconds / NEARLY


@given(measurements(), CHOICES, TASKS, st.floats(0, 1))
def test_better_guesses_are_never_slower(measured: Measured, choice: Choice, task: Task, share: float) -> None:
    worse = dataclasses.replace(measured.drafting, acceptance=measured.drafting.acceptance * share)
    good, bad = predict(measured, choice, task), predict(dataclasses.replace(measured, drafting=worse), choice, task)
    assert bad.parts.total >= good.parts.total / NEARLY
    assert bad.rows_released >= good.rows_released


@given(measurements(), CHOICES, TASKS)
def test_guesses_that_are_never_right_only_cost(measured: Measured, choice: Choice, task: Task) -> None:
    never = dataclasses.replace(measured, drafting=dataclasses.replace(measured.drafting, acceptance=0.0))
    plain = predict(never, dataclasses.replace(choice, guesses=0), task)
    drafted = predict(never, choice, task)
    assert drafted.parts.total >= plain.parts.total / NEARLY
    assert drafted.bytes_up >= plain.bytes_up


@given(measurements(), CHOICES, TASKS)
def test_parts_are_of_one_sum_and_nothing_is_negative(measured: Measured, choice: Choice, task: Task) -> None:
    one = predict(measured, choice, task)
    assert min(one.parts.as_dict().values()) >= 0
    assert one.tokens_per_second == pytest.approx(1 / sum(one.parts.as_dict().values()))
    assert one.first_token_seconds > measured.link.round_trip
    assert one.rows_released >= task.prompt_tokens if task.noise else one.rows_released == 0


@given(measurements(), CHOICES, st.integers(1, 500), st.integers(0, 500), st.booleans())
def test_a_longer_prompt_never_comes_sooner(
    measured: Measured, choice: Choice, prompt: int, more: int, noise: bool
) -> None:
    short, long = (predict(measured, choice, Task(length, 10, noise)) for length in (prompt, prompt + more))
    assert long.first_token_seconds >= short.first_token_seconds / NEARLY
    assert long.rows_released >= short.rows_released


@given(measurements(), CHOICES, TASKS)
def test_more_blocks_here_take_more_memory(measured: Measured, choice: Choice, task: Task) -> None:
    wider = dataclasses.replace(choice, partition=Partition(choice.partition.p + 1, choice.partition.q))
    assert predict(measured, wider, task).memory_bytes > predict(measured, choice, task).memory_bytes


@given(st.integers(0, 8), st.integers(1, 8), st.integers(2, 9))
def test_only_allowed_partitions_are_listed(start: int, length: int, blocks: int) -> None:
    start = min(start, blocks - 1)
    hosted = BlockRange(start, min(blocks, start + length))
    listed = Model(blocks, 64, hosted, 512, 128).partitions()
    sizes = [one.p + one.q for one in listed]
    assert sizes == sorted(sizes)
    for p in range(blocks + 1):
        for q in range(blocks + 1):
            leaves_blocks = p + q < blocks and start <= p and blocks - q <= hosted.stop
            assert (Partition(p, q) in listed) == (p > 0 and leaves_blocks)
