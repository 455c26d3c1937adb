"""Payloads are laid out, checked and cut up as the host's codec does it."""

from __future__ import annotations

import numpy as np
import pytest

from serving.device.device import HostDevice
from serving.device.memory import ALIGNMENT, Field, HostArena, Packing, upload
from serving.device.staging import reply_bytes, reply_layout, row_source, row_stride, stage_payloads
from serving.steps import Step
from split_llama.errors import NonFiniteStates
from split_llama.wire.codec import Codec, decode_rows, encode_rows, row_bytes
from split_llama.wire.frame import Flag
from split_llama.wire.step import build_step

WIDTHS = [32, 64, 100]
SPOILT = {Codec.FP32: "<f4", Codec.FP16: "<f2", Codec.INT8: "<f2"}


def make_step(codec: Codec, rows: bytes, count: int, width: int, flags: int = 0) -> Step:
    frame = build_step(handle=1, seq=1, first=0, count=count, codec=codec, rows=rows, flags=flags)
    return Step.from_frame(frame, width, 1000, 0.0)


def random_step(codec: Codec, count: int, width: int, seed: int, flags: int = 0) -> Step:
    states = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return make_step(codec, encode_rows(codec, states), count, width, flags)


def spoil(step: Step, row: int, width: int, value: float) -> Step:
    """The same step with one value of a row (or a scale of it) replaced by NaN or infinity."""
    raw = np.frombuffer(step.rows, np.uint8).copy().reshape(step.count, -1)
    if step.codec is Codec.BF16:
        spoilt = (np.array([value], np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    else:
        spoilt = np.array([value], SPOILT[step.codec]).view(np.uint8)
    at = width if step.codec is Codec.INT8 else (width - 1) * len(spoilt)
    raw[row, at : at + len(spoilt)] = spoilt
    return make_step(step.codec, raw.tobytes(), step.count, width)


def arena() -> HostArena:
    return HostArena(HostDevice(), 256)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_found_where_the_source_says(width: int) -> None:
    steps = [random_step(codec, count, width, seed=count) for count in (1, 3) for codec in reversed(Codec)]
    staged = stage_payloads(steps, width, arena())
    kept = [5, 0, 2, 7]
    source = row_source(staged, kept, width)
    raw = source.payload.numpy()
    row = 0
    for index in kept:
        step = steps[index]
        size = row_bytes(step.codec, width)
        rows = [raw[at : at + size].tobytes() for at in source.offsets[row : row + step.count]]
        assert b"".join(rows) == bytes(step.rows)
        assert set(source.codecs[row : row + step.count]) == {step.codec}
        row += step.count
    assert len(source.offsets) == row
    assert not (source.offsets % 16).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("width", WIDTHS)
def test_a_step_that_is_not_finite_fails_alone_and_as_on_the_host(width: int, codec: Codec, value: float) -> None:
    good = [random_step(other, 3, width, seed=1) for other in Codec]
    bad = spoil(spoil(random_step(codec, 4, width, seed=2), 1, width, value), 3, width, value)
    staged = stage_payloads([good[0], bad, *good[1:]], width, arena())
    assert [index for index, error in enumerate(staged.errors) if error is not None] == [1]
    with pytest.raises(NonFiniteStates) as on_host:
        decode_rows(codec, bad.rows, np.empty((4, width), np.float32))
    assert str(staged.errors[1]) == str(on_host.value)


@pytest.mark.parametrize("codec", list(Codec))
def test_the_largest_finite_values_pass(codec: Codec) -> None:
    states = np.full((2, 64), -65504.0 if codec in (Codec.FP16, Codec.INT8) else -3.3e38, np.float32)
    step = make_step(codec, encode_rows(codec, states), 2, 64)
    assert stage_payloads([step], 64, arena()).errors == (None,)


@pytest.mark.parametrize("width", WIDTHS)
def test_replies_are_the_rows_asked_for(width: int) -> None:
    flags = [0, int(Flag.REPLY_LAST), int(Flag.REPLY_NONE), 0]
    codecs = [Codec.INT8, Codec.FP32, Codec.FP16, Codec.BF16]
    steps = [random_step(codec, 3, width, 1, flag) for codec, flag in zip(codecs, flags, strict=True)]
    layout = reply_layout(steps, width)
    assert layout.rows.tolist() == [0, 1, 2, 5, 9, 10, 11]
    payload = np.zeros(layout.size, np.uint8)
    states = np.random.default_rng(3).standard_normal((12, width)).astype(np.float32)
    for row, at, codec in zip(layout.rows, layout.offsets, layout.codecs, strict=True):
        encoded = np.frombuffer(encode_rows(Codec(codec), states[row : row + 1]), np.uint8)
        payload[at : at + len(encoded)] = encoded
    want = [states[0:3], states[5:6], states[:0], states[9:12]]
    for step, rows, start in zip(steps, want, layout.starts, strict=True):
        assert reply_bytes(step, payload, start, width) == (encode_rows(step.codec, rows) if len(rows) else b"")


def test_no_replies_at_all() -> None:
    layout = reply_layout([random_step(Codec.FP32, 2, 32, 1, int(Flag.REPLY_NONE))], 32)
    assert layout.size == 0
    assert len(layout.rows) == 0


def test_rows_begin_at_multiples_of_sixteen() -> None:
    assert [row_stride(codec, 100) for codec in Codec] == [400, 208, 208, 112]


def test_an_arena_grows_and_keeps_what_it_gave() -> None:
    memory = arena()
    pieces = [memory.take(size) for size in (100, 300, 5000, 1)]
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    assert [len(piece) for piece in pieces] == [100, 300, 5000, 1]
    assert all((piece == value).all() for value, piece in enumerate(pieces))
    memory.reset()
    again = memory.take(100), memory.take(5000)
    assert again[1].data_ptr() - again[0].data_ptr() == 2 * ALIGNMENT


def test_packed_arrays_come_back_under_their_names() -> None:
    arrays = {
        "small": np.arange(3, dtype=np.int32),
        "none": np.zeros((0, 8), np.int32),
        "wide": np.arange(6, dtype=np.int64).reshape(2, 3) << 40,
        "flags": np.array([True, False]),
    }
    tensors = upload(arrays, arena(), HostDevice())
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        assert tensors[name].numpy().dtype == array.dtype
        assert (tensors[name].numpy() == array).all()
    packing = Packing([Field("a", "int32", (3,)), Field("b", "int64", (1,))])
    assert packing.size == 2 * ALIGNMENT
