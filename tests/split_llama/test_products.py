"""Products of rows with stored matrices, against the dense product in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from split_llama.errors import UsageError
from split_llama.products import FP16_ROWS, GOOD_ROWS, IN_CACHE, DynamicInt8, Half, Numerics, Packed, Rounded, TorchAo

CPU = torch.device("cpu")
ROWS = [1, 2, 3, GOOD_ROWS, 5, 17]
# One larger and one smaller than what stays in a cache, and one whose sizes are no multiples of anything.
SHAPES = [(1100, 300), (8, 8), (257, 1031)]
# Relative to the largest output: half a unit of the stored type for a long dot product of random terms.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}


def case(rows: int, shape: tuple[int, int], with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape[1], generator=generator)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    exact = x.double() @ weight.double().t()
    return x, weight, bias, exact if bias is None else exact + bias.double()


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_type_of_weights_gives_the_dense_product(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    x, weight, bias, exact = case(rows, shape, with_bias)
    product = Numerics(dtype, "none", CPU).product(weight, bias)
    assert (product is None) == (dtype == torch.float32 and weight.numel() < IN_CACHE)
    if product is not None:
        got = product(x)
        assert got.dtype == torch.float32
        assert error(got, exact) < TOLERANCES[dtype]
        assert product.nbytes == weight.numel() * dtype.itemsize


def test_each_type_has_its_own_product() -> None:
    weight = torch.randn(1100, 300)
    kinds = {dtype: type(Numerics(dtype, "none", CPU).product(weight, None)) for dtype in TOLERANCES}
    assert kinds == {torch.float32: Packed, torch.bfloat16: Packed, torch.float16: Half}
    assert type(Numerics(torch.float32, "int8", CPU).product(weight, None)) is DynamicInt8


def test_without_onednn_the_types_still_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight, bias, exact = case(3, (1100, 300), True)
    assert Numerics(torch.float32, "none", CPU).product(weight, bias) is None
    product = Numerics(torch.bfloat16, "none", CPU).product(weight, bias)
    assert isinstance(product, Rounded)
    assert error(product(x), exact) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("rows", [FP16_ROWS, FP16_ROWS + 1])
def test_float16_keeps_its_accuracy_beside_massive_activations(rows: int) -> None:
    x, weight, _, _ = case(rows, (1100, 300), False)
    x[0, 7] = 3e3
    exact = x.double() @ weight.double().t()
    product = Half(weight, None)
    assert error(product(x), exact) < 2e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_is_near_the_dense_product(rows: int, shape: tuple[int, int], with_bias: bool) -> None:
    x, weight, bias, exact = case(rows, shape, with_bias)
    product = DynamicInt8(weight, bias)
    assert product.nbytes == weight.numel()
    # Two roundings to 8 bits, each of about a part in 250 of the row's largest value.
    assert error(product(x), exact) < 0.03


def test_an_int8_row_does_not_depend_on_who_shares_its_batch() -> None:
    x, weight, _, _ = case(6, (1100, 300), False)
    product = DynamicInt8(weight, None)
    beside_small = product(x)
    x[3:] *= 1e4
    x[4, 0] = -1e6
    beside_large = product(x)
    assert torch.equal(beside_small[:3], beside_large[:3])
    assert torch.equal(beside_small[:2], product(x[:2]))


def test_int8_rows_of_zeros_give_zeros() -> None:
    product = DynamicInt8(torch.randn(1100, 300), None)
    for rows in (1, 3):
        assert torch.equal(product(torch.zeros(rows, 300)), torch.zeros(rows, 1100))


def test_torchao_int8_is_near_the_dense_product() -> None:
    x, weight, bias, exact = case(3, (256, 128), True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        product = TorchAo(weight, bias, "int8")
    assert error(product(x), exact) < 0.02


@pytest.mark.parametrize(
    ("quantization", "expected"), [("int3", "none, int8, fp8, int4"), ("fp8", "CUDA"), ("int4", "CUDA")]
)
def test_what_a_cpu_cannot_do_is_refused_with_what_it_can(quantization: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Numerics(torch.float32, quantization, CPU)


def test_states_on_a_cpu_are_float32_whatever_the_weights() -> None:
    assert Numerics(torch.bfloat16, "none", CPU).compute == torch.float32
    assert Numerics(torch.bfloat16, "none", torch.device("cuda")).compute == torch.bfloat16
    assert Numerics(torch.bfloat16, "none", CPU).label == "bfloat16"
    assert Numerics(torch.float32, "int8", CPU).label == "int8"
