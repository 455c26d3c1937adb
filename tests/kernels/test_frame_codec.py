from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kernels.frame_codec.reference as reference
from kernels.frame_codec.kernel import decode_rows, encode_rows
from split_llama.wire import codec as wire
from split_llama.wire.codec import Codec, row_bytes
from tests.kernels.kernel_checks import (
    check_benchmark,
    check_decode,
    check_encode,
    check_flags,
    frame_layout,
    hard_rows,
    normal,
)

# Every codec, a row that is left alone, and a codec twice.
CODECS = [3, 0, -1, 1, 2, 3]
WIDTHS = pytest.mark.parametrize(
    ("width", "aligned"), [(1, False), (7, True), (64, True), (80, False), (100, False), (100, True), (1100, False)]
)
LIMIT = float(np.finfo(np.float32).max)


@WIDTHS
def test_replies_are_the_hosts_bytes(width: int, aligned: bool) -> None:
    for shift in range(0, len(CODECS), 2):
        check_encode("cpu", hard_rows(width), CODECS[shift:] + CODECS[:shift], aligned)


@WIDTHS
def test_requests_are_decoded_as_the_host_decodes_them(width: int, aligned: bool) -> None:
    for shift in range(0, len(CODECS), 2):
        check_decode("cpu", torch.float32, hard_rows(width), CODECS[shift:] + CODECS[:shift], aligned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compute_dtypes(dtype: torch.dtype) -> None:
    rows = normal(6, 100, dtype=torch.float32, device="cpu")
    check_decode("cpu", dtype, rows, CODECS, aligned=False)
    check_encode("cpu", rows.to(dtype), CODECS, aligned=False)


@settings(max_examples=60, deadline=None)
@given(
    rows=hnp.arrays(np.float32, (4, 70), elements=st.floats(-LIMIT, LIMIT, width=32)),
    exponent=st.integers(-149, 0),
    codecs=st.lists(st.integers(-1, 3), min_size=4, max_size=4),
)
def test_any_states(rows: np.ndarray, exponent: int, codecs: list[int]) -> None:
    states = torch.from_numpy(rows * np.float32(2.0**exponent))
    check_encode("cpu", states, codecs, aligned=False)
    check_decode("cpu", torch.float32, states, codecs, aligned=False)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(rows=hnp.arrays(np.uint32, (4, 130)), codecs=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_any_bits(rows: np.ndarray, codecs: list[int]) -> None:
    states = np.where(np.isfinite(rows.view(np.float32)), rows.view(np.float32), np.float32(1))
    check_encode("cpu", torch.from_numpy(states), codecs, aligned=False)


def test_rows_that_are_not_finite_are_flagged_and_no_others() -> None:
    check_flags("cpu")


# NumPy, under the interpreter, remarks that infinity times zero is not a number.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("codec", list(Codec), ids=lambda codec: codec.label)
def test_payloads_that_are_not_finite_are_flagged(codec: Codec) -> None:
    rows = normal(3, 64, dtype=torch.float32, device="cpu").numpy()
    payload = bytearray(wire.encode_rows(codec, rows))
    size = row_bytes(codec, 64)
    # The last two bytes of a row: the exponent of its last value, or of its last scale.
    payload[2 * size - 2 : 2 * size] = {Codec.FP32: b"\x80\x7f", Codec.BF16: b"\xc0\xff"}.get(codec, b"\x01\x7c")
    out, bad = torch.empty(3, 64), torch.zeros(3, dtype=torch.int32)
    raw = torch.frombuffer(payload, dtype=torch.uint8)
    codecs = torch.full((3,), codec.value, dtype=torch.int32)
    decode_rows(raw, torch.arange(3) * size, codecs, out, bad_N=bad)
    assert bad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("width", [64, 100])
def test_the_reference_gives_the_same(width: int) -> None:
    states, codecs = hard_rows(width), torch.tensor(CODECS, dtype=torch.int32)
    offsets, total = frame_layout(CODECS, width, aligned=False)
    rows, payloads, outs = torch.arange(6, dtype=torch.int32), [], []
    for backend in (reference.encode_rows, encode_rows):
        payloads.append(torch.zeros(total, dtype=torch.uint8))
        backend(states, rows, torch.tensor(offsets), codecs, payloads[-1], torch.zeros(6, dtype=torch.int32))
    assert torch.equal(*payloads)
    for backend in (reference.decode_rows, decode_rows):
        outs.append(torch.zeros(6, width))
        backend(payloads[0], torch.tensor(offsets), codecs, outs[-1])
    assert torch.equal(*outs)


def test_the_benchmark_runs() -> None:
    check_benchmark("frame_codec")
