from __future__ import annotations

import pytest
import torch

from kernels.rms_norm.kernel import add_rms_norm
from split_llama.layers import RMSNorm
from tests.kernels.kernel_checks import check_benchmark, check_rms_norm, normal

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 80), (2, 1100)])
@pytest.mark.parametrize(("add", "keep"), [(True, True), (False, False), (False, True), (True, False)])
def test_kernel_gives_what_the_reference_gives(
    dtype: torch.dtype, rows: int, width: int, add: bool, keep: bool
) -> None:
    check_rms_norm("cpu", dtype, rows, width, add, keep)


@DTYPES
def test_without_a_residual_it_is_the_layers_norm(dtype: torch.dtype) -> None:
    x, norm = (
        normal(3, 100, dtype=torch.float16, device="cpu").to(dtype),
        RMSNorm(100, 1e-6, dtype, torch.device("cpu")),
    )
    norm.weight.copy_(normal(100, dtype=dtype, device="cpu", seed=1))
    out = torch.empty_like(x)
    add_rms_norm(x, None, norm.weight, 1e-6, out_ND=out)
    unit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, norm(x), rtol=unit, atol=unit)


def test_outputs_may_be_the_inputs() -> None:
    x, residual = normal(3, 80, dtype=torch.float32, device="cpu"), normal(3, 80, dtype=torch.float32, device="cpu")
    weight, total = torch.full((80,), 2.0), x + residual
    expected = torch.empty_like(x)
    add_rms_norm(x, residual, weight, 1e-5, out_ND=expected)
    add_rms_norm(x, residual, weight, 1e-5, out_ND=x, residual_out_ND=residual)
    assert torch.equal(x, expected)
    assert torch.equal(residual, total)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(AssertionError, match="a residual in"):
        add_rms_norm(x, x.half(), weight, 1e-5, out_ND=x)
    with pytest.raises(AssertionError, match="rows of"):
        add_rms_norm(x, torch.zeros(3, 8), weight, 1e-5, out_ND=x)
    with pytest.raises(AssertionError, match="weight of"):
        add_rms_norm(x, None, torch.ones(9), 1e-5, out_ND=x)


def test_the_benchmark_runs() -> None:
    check_benchmark("rms_norm")
