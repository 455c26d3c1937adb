from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from split_llama.errors import BadStates, NonFiniteStates, UsageError
from split_llama.wire.codec import (
    BF16_MAX,
    FP16_MAX,
    GROUP,
    Codec,
    Floats,
    decode_rows,
    encode_rows,
    finite_rows,
    row_bytes,
)

ALL = pytest.mark.parametrize("codec", list(Codec), ids=lambda codec: codec.label)
WIDTHS = st.sampled_from([1, 7, 63, 64, 65, 128, 200])


@st.composite
def states(draw: st.DrawFn, largest: float = 3.4e38) -> Floats:
    shape = (draw(st.integers(0, 4)), draw(WIDTHS))
    limit = float(np.float32(largest))
    return draw(hnp.arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32)))


def round_trip(codec: Codec, rows: Floats) -> Floats:
    out = np.full_like(rows, np.nan)
    decode_rows(codec, encode_rows(codec, rows), out)
    return out


def ordinary(rows: int, width: int) -> Floats:
    return np.random.default_rng(0).normal(0, 0.02, (rows, width)).astype(np.float32)


@given(rows=states())
def test_fp32_is_exact(rows: Floats) -> None:
    assert (round_trip(Codec.FP32, rows) == rows).all()


@given(rows=states())
def test_fp16_is_within_half_a_unit_and_saturates(rows: Floats) -> None:
    clipped = np.clip(rows, -FP16_MAX, FP16_MAX)
    assert (np.abs(round_trip(Codec.FP16, rows) - clipped) <= np.maximum(np.abs(clipped) * 2.0**-11, 2.0**-25)).all()


@given(rows=states())
def test_bf16_is_within_half_a_unit_and_saturates(rows: Floats) -> None:
    clipped = np.clip(rows, -BF16_MAX, BF16_MAX).astype(np.float64)
    assert (np.abs(round_trip(Codec.BF16, rows) - clipped) <= np.maximum(np.abs(clipped) * 2.0**-8, 2.0**-134)).all()


@given(rows=states(largest=8e6))
def test_int8_is_within_half_a_step_of_its_group(rows: Floats) -> None:
    count, width = rows.shape
    groups = -(-width // GROUP)
    padded = np.zeros((count, groups * GROUP), np.float64)
    padded[:, :width] = rows
    largest = np.abs(padded).reshape(count, groups, GROUP).max(axis=2)
    # The scale is rounded up by at most one fp16 unit: 2^-10 of itself, or the smallest subnormal.
    step = np.repeat(largest / 127 * (1 + 2.0**-10) + 2.0**-24, GROUP, axis=1)[:, :width]
    assert (np.abs(round_trip(Codec.INT8, rows) - rows.astype(np.float64)) <= step * 0.5001).all()


def test_bf16_rounds_to_nearest_even() -> None:
    rows = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-8)]], np.float32)
    expected = [[1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1.0]]
    assert round_trip(Codec.BF16, rows).tolist() == expected


def test_int8_saturates_beyond_the_largest_scale() -> None:
    assert round_trip(Codec.INT8, np.array([[3e38, -3e38]], np.float32)).tolist() == [[FP16_MAX * 127, -FP16_MAX * 127]]


@ALL
@given(rows=states(), cut=st.integers(0, 4))
def test_rows_are_self_contained_and_encoding_is_deterministic(codec: Codec, rows: Floats, cut: int) -> None:
    encoded = encode_rows(codec, rows)
    assert encoded == encode_rows(codec, rows[:cut]) + encode_rows(codec, rows[cut:])
    assert len(encoded) == len(rows) * row_bytes(codec, rows.shape[1])


@ALL
def test_what_was_decoded_encodes_to_the_same_bytes(codec: Codec) -> None:
    rows = ordinary(3, 200)
    assert encode_rows(codec, round_trip(codec, rows)) == encode_rows(codec, rows)


def test_int8_rows_are_values_then_scales() -> None:
    rows = np.zeros((2, 70), np.float32)
    rows[0, 0], rows[0, 1], rows[0, 69], rows[1, 3] = 127, -64, 12.7, 254
    raw = np.frombuffer(encode_rows(Codec.INT8, rows), np.uint8).reshape(2, 74)
    assert raw[:, :70].view(np.int8)[0, [0, 1, 69]].tolist() == [127, -64, 127]
    scales = np.ascontiguousarray(raw[:, 70:]).view("<f2")
    assert scales[0, 0] == 1
    assert scales[0, 1] == pytest.approx(0.1, rel=2**-10)
    assert scales[1].tolist() == [2, 0]


@pytest.mark.parametrize("width", [4096, 4100])
def test_a_massive_activation_costs_only_its_own_group(width: int) -> None:
    rows = ordinary(4, width)
    rows[:, 1415] = 1500
    out = round_trip(Codec.INT8, rows)
    group = slice(1415 // GROUP * GROUP, 1415 // GROUP * GROUP + GROUP)
    others = np.delete(out - rows, group, axis=1)
    assert np.abs(others).max() < 0.02 * 5 / 127
    assert np.abs(out[:, 1415] - 1500).max() < 1500 / 127


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_states_are_refused_before_sending(codec: Codec, bad: float) -> None:
    rows = ordinary(3, 70)
    rows[1, 69] = bad
    with pytest.raises(NonFiniteStates, match="row 1 of 3"):
        encode_rows(codec, rows)


@pytest.mark.parametrize(
    ("codec", "tail"),
    [
        (codec, bits.to_bytes(size, "little"))
        for codec, size, patterns in [
            (Codec.FP32, 4, (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001)),
            (Codec.BF16, 2, (0x7F80, 0xFF80, 0x7FC0, 0x7F81)),
            (Codec.FP16, 2, (0x7C00, 0xFC00, 0x7E00, 0x7C01)),
            (Codec.INT8, 2, (0x7C00, 0xFC00, 0x7E00, 0x7C01)),
        ]
        for bits in patterns
    ],
)
def test_non_finite_payloads_are_refused(codec: Codec, tail: bytes) -> None:
    payload = encode_rows(codec, ordinary(2, 64))[: -len(tail)] + tail
    with pytest.raises(NonFiniteStates, match="row 1 of 2"):
        decode_rows(codec, payload, np.empty((2, 64), np.float32))


@ALL
@given(payload=st.binary(max_size=300), count=st.integers(0, 3), width=WIDTHS)
def test_any_payload_decodes_or_is_refused(codec: Codec, payload: bytes, count: int, width: int) -> None:
    out = np.zeros((count, width), np.float32)
    try:
        decode_rows(codec, payload, out)
    except BadStates:
        assert len(payload) != count * row_bytes(codec, width)
        assert (out == 0).all()
    except NonFiniteStates:
        assert len(payload) == count * row_bytes(codec, width)
    else:
        assert np.isfinite(out).all()


@ALL
def test_rows_decode_straight_into_a_batch(codec: Codec) -> None:
    rows, batch = ordinary(2, 64), np.zeros((5, 64), np.float32)
    decode_rows(codec, memoryview(encode_rows(codec, rows)), batch[1:3])
    assert (batch[1:3] == round_trip(codec, rows)).all()
    assert not batch[[0, 3, 4]].any()


def test_codecs_are_chosen_by_name_and_refused_by_number() -> None:
    assert [Codec.parse(codec.label) for codec in Codec] == list(Codec)
    with pytest.raises(UsageError, match="fp32, bf16, fp16, int8"):
        Codec.parse("int4")
    with pytest.raises(BadStates, match="unknown codec 9"):
        Codec.from_wire(9)


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("width", [1, 63, 64, 130])
def test_finite_rows_are_told_without_decoding(codec: Codec, width: int) -> None:
    states = np.random.default_rng(0).standard_normal((6, width)).astype(np.float32)
    states[0], states[1] = 65504.0, -65504.0
    encoded = np.frombuffer(encode_rows(codec, states), np.uint8).reshape(6, -1).copy()
    assert finite_rows(codec, encoded, width).all()
    kind = np.dtype("<u4" if codec is Codec.FP32 else "<u2")
    exponent = {Codec.FP32: 0x7F800000, Codec.BF16: 0x7F80}.get(codec, 0x7C00)
    sign = 1 << (8 * kind.itemsize - 1)
    # The last number of a row is a value, or a scale of int8: infinity, minus infinity, and NaN of both signs.
    for row, bits in zip((0, 2, 3, 5), (exponent, exponent | sign, exponent | 1, exponent | sign | 1), strict=True):
        encoded[row, -kind.itemsize :] = np.array([bits], kind).view(np.uint8)
    assert finite_rows(codec, encoded, width).tolist() == [False, True, False, False, True, False]
