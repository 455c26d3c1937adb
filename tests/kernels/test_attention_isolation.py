"""What must not matter: who shares the batch, where pages lie, padding; and what must not be touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.kv_pages import KVPages, dequantise, quantise
from kernels.paged_attention import launch, planner
from kernels.paged_attention.launch import AttentionInputs, Scratch
from kernels.paged_attention.planner import Tiles, plan_attention
from split_llama.mask import MaskDescriptor
from tests.kernels.attention_cases import (
    FAMILIES,
    Batch,
    Heads,
    Run,
    assert_matches,
    attend,
    attend_batch,
    make_batch,
    scratch_for,
    wide_tree,
)

TILES = Tiles(16, 32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "CHUNK", 64)


def mixed_batch(spare_rows: int = 0) -> Batch:
    """Splits, windows, a tree and several query tiles in one launch."""
    runs = [FAMILIES[name][1](150) for name in ("decode", "sinks and window", "tree", "chunked prefill")]
    return make_batch(runs, Heads(), window=90, spare_rows=spare_rows)


def test_a_sequence_is_bitwise_the_same_alone_and_in_a_batch() -> None:
    batch = mixed_batch()
    together = attend_batch(batch, TILES)
    row = 0
    for run in batch.runs:
        rows = slice(row, row + run.count)
        alone = replace(batch, runs=(run,), q=batch.q[rows].clone())
        assert torch.equal(attend_batch(alone, TILES), together[rows])
        row += run.count


def test_page_order_does_not_matter() -> None:
    batch = mixed_batch()
    order = torch.randperm(batch.kv.k.shape[0], generator=torch.Generator().manual_seed(5))
    inverse = order.argsort().tolist()
    moved = replace(
        batch,
        kv=KVPages(batch.kv.k[order], batch.kv.v[order]),
        runs=tuple(replace(run, block_table=tuple(inverse[page] for page in run.block_table)) for run in batch.runs),
    )
    assert torch.equal(attend_batch(batch, TILES), attend_batch(moved, TILES))


def test_padding_changes_nothing() -> None:
    batch = mixed_batch(spare_rows=3)
    plan = plan_attention(batch.runs, window=batch.window, tiles=TILES, group=2)
    inputs = AttentionInputs.of(batch.runs, plan, CPU)
    items = torch.full((inputs.items.shape[0] + 4, 8), -1, dtype=torch.int32)
    # Padding may stand anywhere.
    items[2:-2] = inputs.items
    combines = torch.zeros(inputs.combines.shape[0] + 3, 4, dtype=torch.int32)
    combines[1:-2] = inputs.combines
    out = torch.full_like(batch.q, 7.0)
    padded = replace(
        inputs, items=items, combines=combines, row_slots=torch.cat([inputs.row_slots, inputs.row_slots - 99])
    )
    attend(batch, padded, TILES, scratch_for(batch, TILES, plan.num_slots), out)
    assert torch.equal(out, attend_batch(batch, TILES))
    assert_matches(out, batch)


def test_scratch_beside_the_slots_is_not_touched() -> None:
    batch = mixed_batch()
    plan = plan_attention(batch.runs, window=batch.window, tiles=TILES, group=2)
    guard = 2
    whole = scratch_for(batch, TILES, plan.num_slots + 2 * guard)
    whole.out.fill_(123.0)
    whole.lse.fill_(123.0)
    inner = slice(guard, guard + plan.num_slots)
    out = torch.full_like(batch.q, 7.0)
    attend(batch, AttentionInputs.of(batch.runs, plan, CPU), TILES, Scratch(whole.out[inner], whole.lse[inner]), out)
    assert_matches(out, batch)
    for part in (whole.out, whole.lse):
        assert (part[:guard] == 123.0).all()
        assert (part[-guard:] == 123.0).all()
        assert (part[inner] != 123.0).any()


def test_keys_of_later_query_tiles_are_not_read() -> None:
    # NaN in the newest slot may reach the query tile that sees it, and no other.
    batch = make_batch([Run(MaskDescriptor(40), 10, 30)], Heads(), spare_rows=0)
    run = batch.runs[0]
    clean = attend_batch(batch, TILES)
    for pages in (batch.kv.k, batch.kv.v):
        pages[run.block_table[39 // 16], 39 % 16] = float("nan")
    poisoned = attend_batch(batch, TILES)
    rows_per_tile = TILES.rows // 2
    before_last_tile = 29 // rows_per_tile * rows_per_tile
    assert torch.equal(poisoned[:before_last_tile], clean[:before_last_tile])
    assert poisoned[-1].isnan().all()


@pytest.mark.parametrize("window", [0, 11])
def test_64_nodes_and_tail_tiles_that_a_query_tile_does_not_see(window: int) -> None:
    batch = make_batch([wide_tree(37)], Heads(), window=window)
    assert_matches(attend_batch(batch, Tiles(16, 16)), batch)


def test_rows_that_see_nothing_give_zeros() -> None:
    batch = make_batch([Run(MaskDescriptor(20, kv_begin=18), 10, 10)], Heads(), spare_rows=0)
    out = attend_batch(batch, TILES)
    assert (out[:8] == 0).all()
    assert (out[8:] != 0).any(-1).all()


def test_nothing_planned_writes_nothing() -> None:
    batch = make_batch([Run(MaskDescriptor(20), 19)], Heads(), spare_rows=0)
    plan = plan_attention(batch.runs, window=0, tiles=TILES, group=2, members=())
    out = torch.full_like(batch.q, 7.0)
    attend(batch, AttentionInputs.of(batch.runs, plan, CPU), TILES, scratch_for(batch, TILES, 0), out)
    assert (out == 7.0).all()


def test_fp8_as_bytes_holds_every_value() -> None:
    # The path of devices whose compiler knows no float8_e4m3fn: all 254 finite values as the V of one visible key.
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = stored.float().where(stored.float().isfinite(), 0.0).view(1, 256).to(torch.float8_e4m3fn)
    shape = (1, 8, 1, 256)
    pages = torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    pages.view(torch.uint8)[0, 0] = values.view(torch.uint8)
    kv = KVPages(pages, pages, torch.ones(shape[:3]), torch.ones(shape[:3]))
    assert launch._loadable(kv.k).dtype == torch.uint8
    batch = Batch((Run(MaskDescriptor(1), 0, 1, None, (0,)),), torch.zeros(1, 1, 256), kv, 0)
    assert torch.equal(attend_batch(batch, TILES)[0], values.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantise(dtype: torch.dtype) -> None:
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    stored, scale = quantise(values, dtype)
    assert stored.dtype == dtype
    assert scale[3] == 0
    step = scale / 2 if dtype == torch.int8 else values.abs().amax(-1) / 16
    assert ((dequantise(stored, scale) - values).abs() <= step[:, None] * (1 + 1e-6)).all()
    assert torch.equal(dequantise(stored, scale)[3], torch.zeros(64))


@pytest.mark.parametrize(
    "broken",
    [
        {"v": torch.zeros(3, 8, 2, 4)},
        {"k": torch.zeros(2, 8, 2, 4, dtype=torch.float64), "v": torch.zeros(2, 8, 2, 4, dtype=torch.float64)},
        {"k_scale": torch.zeros(2, 8, 2)},
        {"k": torch.zeros(2, 8, 2, 4, dtype=torch.int8), "v": torch.zeros(2, 8, 2, 4, dtype=torch.int8)},
        {"k": torch.zeros(2, 2, 8, 4).transpose(1, 2)},
    ],
)
def test_pages_of_another_kind_are_refused(broken: dict[str, torch.Tensor]) -> None:
    pages = {"k": torch.zeros(2, 8, 2, 4), "v": torch.zeros(2, 8, 2, 4)}
    KVPages(**pages)
    with pytest.raises(ValueError, match=r"must be|take no|need both"):
        KVPages(**{**pages, **broken})
