"""Attention as compiled for the device at hand: precision, isolation, far offsets, guard regions, graph replay."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from split_llama.mask import MaskDescriptor

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def cases(device: torch.device) -> ModuleType:
    """The batches of the interpreter's tests, imported where kernels are compiled."""
    from tests.kernels import attention_cases

    return attention_cases


def close(cases: ModuleType, out: torch.Tensor, batch: object) -> None:
    """16-bit probabilities and outputs: two roundings of values up to about 4."""
    cases.assert_matches(out, batch, rtol=2e-2, atol=2e-2)


def mixed(cases: ModuleType, device: torch.device, **heads: object) -> object:
    """All families in one launch, some of them split, at head_dim 128."""
    runs = [run(length) for _, run in cases.FAMILIES.values() for length in (1, 300, 1500)]
    geometry = cases.Heads(kv_heads=2, group=4, head_dim=128, dtype=BF16, **{"kv_dtype": BF16, **heads})
    return cases.make_batch(runs, geometry, window=700, device=str(device))


@pytest.mark.parametrize("kv_dtype", [BF16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(16, 64), (16, 32), (64, 32), (128, 64)])
def test_bf16_against_float64(
    cases: ModuleType, device: torch.device, kv_dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    batch = mixed(cases, device, kv_dtype=kv_dtype)
    close(cases, cases.attend_batch(batch, cases.Tiles(*shape)), batch)


@pytest.mark.parametrize("head_dim", [8, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_head_dims_and_types(cases: ModuleType, device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    runs = [run(length) for _, run in cases.FAMILIES.values() for length in (3, 600)]
    geometry = cases.Heads(group=4, head_dim=head_dim, dtype=dtype, kv_dtype=dtype)
    batch = cases.make_batch(runs, geometry, device=str(device))
    out = cases.attend_batch(batch, cases.Tiles(16, 16))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    cases.assert_matches(out, batch, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(16, 64), (64, 32), (128, 64)])
@pytest.mark.parametrize("kv_dtype", [BF16, torch.int8])
def test_a_sequence_is_bitwise_the_same_alone_and_in_a_batch(
    cases: ModuleType, device: torch.device, shape: tuple[int, int], kv_dtype: torch.dtype
) -> None:
    tiles = cases.Tiles(*shape)
    batch = mixed(cases, device, kv_dtype=kv_dtype)
    together = cases.attend_batch(batch, tiles)
    row = 0
    for run in batch.runs:
        rows = slice(row, row + run.count)
        alone = replace(batch, runs=(run,), q=batch.q[rows].clone())
        assert torch.equal(cases.attend_batch(alone, tiles), together[rows])
        row += run.count


def test_pages_past_two_gigabytes(cases: ModuleType, device: torch.device) -> None:
    near = cases.make_batch(
        [cases.decode(900)],
        cases.Heads(kv_heads=8, group=4, head_dim=128, dtype=BF16, kv_dtype=BF16),
        device=str(device),
    )
    # Both the index of an element and its byte offset pass 2^31 on the last pages.
    page_numbers = near.kv.k[0].numel()
    pages = 2**31 // page_numbers + 200
    free, _ = torch.cuda.mem_get_info(device)
    if free < 2 * 2 * pages * page_numbers * 1.1:
        pytest.skip("needs 10 GB of free device memory")
    moved = pages - near.kv.k.shape[0]
    far_k, far_v = (torch.empty(pages, *near.kv.k.shape[1:], dtype=BF16, device=device) for _ in "kv")
    far_k[moved:], far_v[moved:] = near.kv.k, near.kv.v
    (run,) = near.runs
    far_run = replace(run, block_table=tuple(page + moved for page in run.block_table))
    far = replace(near, kv=type(near.kv)(far_k, far_v), runs=(far_run,))
    tiles = cases.Tiles(16, 64)
    assert torch.equal(cases.attend_batch(far, tiles), cases.attend_batch(near, tiles))


@pytest.mark.parametrize("shape", [(16, 64), (64, 32)])
def test_scratch_beside_the_slots_is_not_touched(
    cases: ModuleType, device: torch.device, shape: tuple[int, int]
) -> None:
    tiles, guard = cases.Tiles(*shape), 2
    batch = mixed(cases, device)
    plan = cases.plan_attention(batch.runs, window=batch.window, tiles=tiles, group=4)
    whole = cases.scratch_for(batch, tiles, plan.num_slots + 2 * guard)
    whole.out.fill_(123.0)
    whole.lse.fill_(123.0)
    inner = slice(guard, guard + plan.num_slots)
    inputs = cases.AttentionInputs.of(batch.runs, plan, device)
    out = torch.full_like(batch.q, 7.0)
    cases.attend(batch, inputs, tiles, cases.Scratch(whole.out[inner], whole.lse[inner]), out)
    close(cases, out, batch)
    for part in (whole.out, whole.lse):
        assert (part[:guard] == 123.0).all()
        assert (part[-guard:] == 123.0).all()


def test_a_graph_replays_with_other_lengths(cases: ModuleType, device: torch.device) -> None:
    tiles, window = cases.Tiles(16, 64), 0
    geometry = cases.Heads(kv_heads=2, group=4, head_dim=128, dtype=BF16, kv_dtype=BF16)
    long = cases.make_batch([cases.decode(2000), cases.decode(700)], geometry, spare_rows=0, device=str(device))
    plan = cases.plan_attention(long.runs, window=window, tiles=tiles, group=4)
    inputs = cases.AttentionInputs.of(long.runs, plan, device)
    scratch = cases.scratch_for(long, tiles, plan.num_slots)
    out = torch.full_like(long.q, 7.0)
    cases.attend(long, inputs, tiles, scratch, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cases.attend(long, inputs, tiles, scratch, out)
    runs = tuple(
        replace(run, mask=MaskDescriptor(length), first=length - 1)
        for run, length in zip(long.runs, (900, 65), strict=True)
    )
    short = replace(long, runs=runs)
    plan = cases.plan_attention(runs, window=window, tiles=tiles, group=4)
    fresh = cases.AttentionInputs.of(runs, plan, device)
    inputs.items.fill_(-1)[: fresh.items.shape[0]] = fresh.items
    inputs.combines.zero_()[: fresh.combines.shape[0]] = fresh.combines
    inputs.sequences.copy_(fresh.sequences)
    inputs.row_slots.copy_(fresh.row_slots)
    graph.replay()
    close(cases, out, short)
