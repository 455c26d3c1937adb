from __future__ import annotations

import pytest
import torch

from kernels.silu_mul.kernel import silu_mul
from tests.kernels.kernel_checks import check_benchmark, check_silu_mul

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 48), (2, 1100)])
def test_kernel_gives_what_the_reference_gives(dtype: torch.dtype, rows: int, width: int) -> None:
    check_silu_mul("cpu", dtype, rows, width)


def test_no_rows_launch_nothing() -> None:
    out = torch.empty(0, 8)
    silu_mul(torch.empty(0, 16), out)
    assert out.shape == (0, 8)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        silu_mul(torch.zeros(16, 4).t(), torch.zeros(4, 8))
    with pytest.raises(AssertionError, match="gate and up"):
        silu_mul(torch.zeros(4, 12), torch.zeros(4, 8))


def test_the_benchmark_runs() -> None:
    check_benchmark("silu_mul")
