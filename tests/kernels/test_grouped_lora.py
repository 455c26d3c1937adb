from __future__ import annotations

import pytest
import torch

from kernels.grouped_lora.kernel import grouped_lora
from tests.kernels.kernel_checks import check_benchmark, check_grouped_lora, normal

MIXED = [2, -1, 0, 2, 2, -1, 3]


@pytest.mark.parametrize("rank", [4, 16, 24, 64])
def test_kernel_gives_what_the_reference_gives(rank: int) -> None:
    check_grouped_lora("cpu", torch.float32, MIXED, rank, 80, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check_grouped_lora("cpu", dtype, MIXED, 8, 96, 64)


def test_several_tiles_pieces_and_blocks_of_outputs() -> None:
    check_grouped_lora("cpu", torch.float32, ([0] * 17 + [-1] * 2 + [3, 1, 3]) * 2, 8, 1100, 300)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 12, 16, 32, 48, 64])
@pytest.mark.parametrize("adapter", [[-1], [0], [3] * 40, list(range(4)) * 9, MIXED], ids=len)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (80, 48), (600, 260)])
def test_every_geometry(dtype: torch.dtype, rank: int, adapter: list[int], inputs: int, outputs: int) -> None:
    check_grouped_lora("cpu", dtype, adapter, rank, inputs, outputs)


def test_a_row_gets_the_same_bits_alone_and_among_others() -> None:
    x, a = normal(20, 600, dtype=torch.float32, device="cpu"), normal(3, 8, 600, dtype=torch.float32, device="cpu")
    b, scaling = normal(3, 80, 8, dtype=torch.float32, device="cpu"), torch.tensor([1.0, 2.0, 0.5])
    adapter = torch.tensor([row % 4 - 1 for row in range(20)], dtype=torch.int32)
    together = torch.ones(20, 80)
    grouped_lora(x, a, b, adapter, scaling, together)
    for row in (1, 6, 19):
        alone = torch.ones(1, 80)
        grouped_lora(x[row : row + 1], a, b, adapter[row : row + 1], scaling, alone)
        assert torch.equal(alone[0], together[row])


def test_an_adapter_of_lower_rank_padded_with_zeros_is_itself() -> None:
    x, a, b = (normal(*shape, dtype=torch.float32, device="cpu") for shape in ((2, 64), (1, 4, 64), (1, 32, 4)))
    adapter, scaling, outs = torch.zeros(2, dtype=torch.int32), torch.ones(1), torch.zeros(2, 2, 32)
    grouped_lora(x, a, b, adapter, scaling, outs[0])
    wider_a, wider_b = torch.cat((a, torch.zeros(1, 20, 64)), dim=1), torch.cat((b, torch.zeros(1, 32, 20)), dim=2)
    grouped_lora(x, wider_a, wider_b, adapter, scaling, outs[1])
    torch.testing.assert_close(outs[0], outs[1])


def test_what_does_not_fit_is_refused() -> None:
    x, adapter, scaling = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32), torch.ones(1)
    with pytest.raises(AssertionError, match="b of"):
        grouped_lora(x, torch.zeros(1, 4, 8), torch.zeros(1, 6, 5), adapter, scaling, torch.zeros(2, 6))
    with pytest.raises(AssertionError, match="a takes"):
        grouped_lora(x, torch.zeros(1, 4, 9), torch.zeros(1, 6, 4), adapter, scaling, torch.zeros(2, 6))


def test_the_benchmark_runs() -> None:
    check_benchmark("grouped_lora")
