"""Every kernel but attention against its reference on the device, at real sizes and in the dtypes that models have.

The checks are those of tests/kernels, where the interpreter runs them; here bf16 is rounded as it should be.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn)
CODECS = [3, 0, -1, 1, 2, 3]


@pytest.fixture(scope="module")
def checks(device: torch.device) -> ModuleType:
    """The checks, imported only once there is a device to run them on."""
    from tests.kernels import kernel_checks

    return kernel_checks


@HALVES
@pytest.mark.parametrize(("rows", "width"), [(1, 11008), (64, 14336), (1000, 80)])
def test_silu_mul(checks: ModuleType, dtype: torch.dtype, rows: int, width: int) -> None:
    checks.check_silu_mul("cuda", dtype, rows, width)


@HALVES
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (64, 8192), (1000, 896), (3, 80)])
@pytest.mark.parametrize(("add", "keep"), [(True, True), (False, False)])
def test_rms_norm(checks: ModuleType, dtype: torch.dtype, rows: int, width: int, add: bool, keep: bool) -> None:
    checks.check_rms_norm("cuda", dtype, rows, width, add, keep)


@HALVES
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 32, 80), (14, 2, 64), (4, 2, 8)])
@pytest.mark.parametrize("norm", [False, True])
def test_rotary_write(
    checks: ModuleType,
    dtype: torch.dtype,
    storage: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norm: bool,
) -> None:
    checks.check_rotary_write(
        "cuda", dtype, storage, rows=133, heads=heads, kv_heads=kv_heads, head_dim=head_dim, norm=norm, page_size=16
    )


def test_rotary_at_far_positions(checks: ModuleType) -> None:
    # 133 rows, 977 positions apart: past the 105,615 radians up to which a cheaper range reduction would do.
    checks.check_rotary_write("cuda", torch.float32, torch.float32, rows=133, heads=8, kv_heads=8, head_dim=128)


@pytest.mark.parametrize(("width", "aligned"), [(4096, True), (4096, False), (80, False), (100, True), (7, True)])
def test_frames(checks: ModuleType, width: int, aligned: bool) -> None:
    hard = checks.hard_rows(width)
    for shift in range(0, len(CODECS), 2):
        codecs = CODECS[shift:] + CODECS[:shift]
        checks.check_encode("cuda", hard.to("cuda"), codecs, aligned)
        checks.check_decode("cuda", torch.float32, hard, codecs, aligned)


@HALVES
def test_frames_in_compute_dtypes(checks: ModuleType, dtype: torch.dtype) -> None:
    rows = checks.normal(6, 5120, dtype=torch.float32, device="cpu")
    checks.check_encode("cuda", rows.to("cuda", dtype), CODECS, aligned=True)
    checks.check_decode("cuda", dtype, rows, CODECS, aligned=True)


def test_frames_of_any_bits(checks: ModuleType) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (512, 1024), generator=torch.Generator().manual_seed(0))
    states = bits.to(torch.int32).view(torch.float32)
    states = torch.where(states.isfinite(), states, 1.0)
    codecs = [row % 4 for row in range(512)]
    checks.check_encode("cuda", states.to("cuda"), codecs, aligned=False)
    checks.check_decode("cuda", torch.float32, states, codecs, aligned=False)


def test_rows_that_are_not_finite_are_flagged(checks: ModuleType) -> None:
    checks.check_flags("cuda")


@HALVES
@pytest.mark.parametrize("rank", [4, 16, 24, 64])
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_grouped_lora(checks: ModuleType, dtype: torch.dtype, rank: int, rows: int) -> None:
    mixed = [row * 7 % 5 - 1 for row in range(rows)]
    checks.check_grouped_lora("cuda", dtype, mixed, rank, 4096, 6144)
    checks.check_grouped_lora("cuda", dtype, sorted(mixed), rank, 1100, 300)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(("page_size", "kv_heads", "head_dim"), [(16, 8, 128), (64, 32, 80), (8, 1, 8)])
def test_cache_edits(checks: ModuleType, storage: torch.dtype, page_size: int, kv_heads: int, head_dim: int) -> None:
    checks.check_cache_edits("cuda", storage, blocks=4, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim)


def test_moves_read_everything_before_they_write(checks: ModuleType) -> None:
    # Chains of 63 moves down by one slot, many at once and again: a thread that wrote early would show.
    for _ in range(20):
        checks.check_cache_edits("cuda", torch.bfloat16, blocks=8, page_size=64, kv_heads=16, head_dim=128)


def test_offsets_beyond_two_gigabytes(checks: ModuleType) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    checks.check_far_edits("cuda", pages=2**31 // (16 * 1024) + 2)
