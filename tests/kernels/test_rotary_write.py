from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.kv_pages import quantise
from kernels.rotary_write.kernel import rotary_write
from split_llama.config import ModelConfig
from split_llama.layers import RotaryEmbedding, rotate
from tests.kernels.kernel_checks import check_benchmark, check_rotary_write, normal, pages_of

TinyCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_kernel_gives_what_the_reference_gives(storage: torch.dtype, head_dim: int) -> None:
    check_rotary_write("cpu", torch.float32, storage, rows=3, heads=6, kv_heads=2, head_dim=head_dim, norm=True)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (32, 8), (28, 4), (7, 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_every_geometry(
    storage: torch.dtype, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, norm: bool
) -> None:
    check_rotary_write("cpu", dtype, storage, rows=5, heads=heads, kv_heads=kv_heads, head_dim=head_dim, norm=norm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(20, 20), (7, 1)])
def test_more_heads_than_a_tile_and_fewer(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    check_rotary_write("cpu", dtype, dtype, rows=2, heads=heads, kv_heads=kv_heads, head_dim=128, page_size=16)


def test_it_turns_as_the_layers_do(tiny_checkpoint: TinyCheckpoint) -> None:
    heads, kv_heads, width = 4, 2, 16
    folder = tiny_checkpoint(family="llama3", heads=heads, kv_heads=kv_heads, head_dim=width)
    rotary = RotaryEmbedding(ModelConfig.from_hf(json.loads((folder / "config.json").read_text())), CPU)
    qkv, kv = normal(3, 8, width, dtype=torch.float32, device="cpu"), pages_of(torch.float32, 2, 8, kv_heads, width)
    positions, slots = torch.tensor([0, 5, 4000], dtype=torch.int32), torch.tensor([9, 2, 15])
    q_out = torch.empty(3, heads, width)
    rotary_write(
        qkv, positions, slots, rotary.inverse_frequencies, kv,
        heads=heads, kv_heads=kv_heads, eps=1e-6, q_out_NHK=q_out,
    )  # fmt: skip
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = rotary(positions, torch.float32)
    torch.testing.assert_close(q_out, rotate(q, *angles))
    torch.testing.assert_close(kv.k.flatten(0, 1)[slots], rotate(k, *angles))
    assert torch.equal(kv.v.flatten(0, 1)[slots], v)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-5, 1.0, 1e30])
def test_every_magnitude_is_stored_as_pytorch_stores_it(dtype: torch.dtype, scale: float) -> None:
    steps = torch.cat((torch.linspace(-448, 448, 4096), 2.0 ** torch.linspace(-12, 0, 1024)))
    # The last value of each head is its largest, so that scales are exact and ties are ties.
    v = (torch.cat((steps.view(-1, 8)[:, :7], torch.full((640, 1), 448.0)), dim=1) * scale).view(1, 640, 8)
    kv = pages_of(dtype, 1, 8, 640, 8)
    qkv = torch.cat((torch.zeros(1, 1, 8), torch.zeros_like(v), v), dim=1)
    # One query head, as many key heads as values: what is turned does not matter here.
    rotary_write(
        qkv, torch.zeros(1, dtype=torch.int32), torch.tensor([5]), torch.ones(4), kv,
        heads=1, kv_heads=640, eps=1e-6, q_out_NHK=torch.empty(1, 1, 8),
    )  # fmt: skip
    stored, scales = quantise(v, dtype)
    assert kv.v_scale is not None
    assert torch.equal(kv.v[0, 5].view(torch.uint8), stored[0].view(torch.uint8))
    assert torch.equal(kv.v_scale[0, 5], scales[0])
    assert kv.k_scale is not None
    assert not kv.k_scale[0, 5].any()
    assert not kv.k[0, 5].float().any()


def test_slots_beyond_two_gigabytes_are_reached_with_64_bits() -> None:
    # Only the last page of this memory is touched.
    pages, heads, width = 2**31 // (256 * 64) + 1, 1, 64
    kv = pages_of(torch.int8, 1, 256, heads, width)
    huge = [torch.empty(pages, 256, heads, width, dtype=torch.int8) for _ in range(2)]
    scales = [torch.empty(pages, 256, heads) for _ in range(2)]
    kv = type(kv)(huge[0], huge[1], scales[0], scales[1])
    slot = pages * 256 - 1
    assert slot * width > 2**31
    v = torch.arange(width).float().view(1, 1, width)
    rotary_write(
        torch.cat((v, v, v), dim=1), torch.zeros(1, dtype=torch.int32), torch.tensor([slot]), torch.ones(32), kv,
        heads=1, kv_heads=1, eps=1e-6, q_out_NHK=torch.empty(1, 1, width),
    )  # fmt: skip
    assert torch.equal(kv.v[-1, -1, 0], quantise(v, torch.int8)[0][0, 0])


def test_what_does_not_fit_is_refused() -> None:
    kv, good = pages_of(torch.float32, 1, 8, 2, 16), torch.zeros(2, 8, 16)
    numbers = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.ones(8)
    with pytest.raises(AssertionError, match="qkv of"):
        rotary_write(good, *numbers, kv, heads=5, kv_heads=2, eps=1e-6, q_out_NHK=torch.empty(2, 5, 16))
    with pytest.raises(AssertionError, match="norms of both"):
        rotary_write(
            good, *numbers, kv, heads=4, kv_heads=2, q_norm=torch.ones(16), eps=1e-6, q_out_NHK=torch.empty(2, 4, 16)
        )
    with pytest.raises(AssertionError, match="queries of"):
        rotary_write(good, *numbers, kv, heads=4, kv_heads=2, eps=1e-6, q_out_NHK=torch.empty(2, 5, 16))


def test_the_benchmark_runs() -> None:
    check_benchmark("rotary_write")
