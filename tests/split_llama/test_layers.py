"""Products of few rows: the order of the factors changes the speed and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from split_llama.layers import IN_CACHE, project


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("shape", [(1100, 300), (300, 1100), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_project_is_linear(rows: int, shape: tuple[int, int], dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, shape[1], dtype=dtype), torch.randn(shape, dtype=dtype)
    bias = torch.randn(shape[0], dtype=dtype) if with_bias else None
    got = project(x, weight, bias)
    assert got.is_contiguous()
    assert got.dtype == dtype
    torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_the_shapes_above_take_both_ways() -> None:
    assert 8 * 8 < IN_CACHE < 1100 * 300
