"""The PyTorch backend against a dense float64 reference, with garbage wherever no query may look."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.attention import TorchAttention
from split_llama.engine.kv_cache import KVCache, Order
from split_llama.engine.plan import SequenceRun
from split_llama.mask import NO_TAIL, MaskDescriptor, to_dense

TREE = (0b1, 0b11, 0b101, 0b1011, 0b10101)
BLOCKS = BlockRange(0, 1)
PAGES = 600


def config(heads: int, groups: int, width: int) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "llama",
            "hidden_size": heads * width,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": width,
            "vocab_size": 8,
        }
    )


def run_of(length: int, count: int, page_size: int, table: list[int], **mask: int) -> SequenceRun:
    pages = -(-length // page_size)
    descriptor = MaskDescriptor(kv_len=length, **mask)
    tree = TREE[:count] if descriptor.tail_begin != NO_TAIL else None
    return SequenceRun(BLOCKS, tuple(table.pop() for _ in range(pages)), descriptor, length - count, count, tree)


def families(page_size: int, rng: random.Random) -> list[SequenceRun]:
    """A ragged batch with every kind of mask, on shuffled pages."""
    table = rng.sample(range(PAGES), PAGES)
    lengths = [page_size - 1, page_size, page_size + 1, 1, 3 * page_size + 2]
    runs = [run_of(max(1, n), 1, page_size, table) for n in lengths]
    runs += [run_of(n + 9, 9, page_size, table) for n in lengths]
    runs += [run_of(29, count, page_size, table, kv_begin=5) for count in (1, 7)]
    runs += [run_of(40, count, page_size, table, kv_begin=3, sink_end=5) for count in (1, 6)]
    runs += [run_of(30, 5, page_size, table, tail_begin=25), run_of(5, 5, page_size, table, tail_begin=0)]
    blind = run_of(20, 3, page_size, table)
    return [*runs, replace(blind, mask=replace(blind.mask, kv_begin=19), first=17)]


def dense(run: SequenceRun, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the definition, float64; `k` and `v` are the sequence's own slots in order."""
    seen = torch.tensor(to_dense(run.mask, window, run.first, run.count, run.tree))
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q, dtype=torch.float64)
    for row in range(run.count):
        keys = seen[row].nonzero().flatten()
        for head in range(q.shape[1]):
            if not len(keys):
                continue
            scores = k[keys, head // group].double() @ q[row, head].double() / math.sqrt(q.shape[2])
            out[row, head] = scores.softmax(0) @ v[keys, head // group].double()
    return out


@pytest.mark.parametrize("window", [0, 1, 7, 16])
@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 16)])
@pytest.mark.parametrize("order", Order, ids=lambda order: order.name)
def test_every_mask_family_matches_the_dense_mask(
    window: int, page_size: int, heads: int, groups: int, width: int, order: Order
) -> None:
    torch.manual_seed(0)
    cache = KVCache(
        config(heads, groups, width),
        BLOCKS,
        num_pages=PAGES,
        page_size=page_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
        order=order,
    )
    runs = families(page_size, random.Random(page_size))
    k_cache, v_cache = cache.block(0)
    k_cache.fill_(math.nan)
    v_cache.fill_(math.nan)
    rows = sum(run.count for run in runs)
    q, k, v = torch.randn(rows, heads, width), torch.randn(rows, groups, width), torch.randn(rows, groups, width)
    poison_and_fill(runs, window, page_size, k_cache, v_cache)
    out = TorchAttention().plan(runs, cache, (window,))(0, q, k, v)
    start = 0
    for run in runs:
        span = slice(start, start + run.count)
        start += run.count
        slots = [run.block_table[s // page_size] * page_size + s % page_size for s in range(run.mask.kv_len)]
        want = dense(run, window, q[span], k_cache[slots], v_cache[slots])
        torch.testing.assert_close(out[span].double(), want, rtol=1e-5, atol=1e-5)


def poison_and_fill(runs: list[SequenceRun], window: int, page_size: int, k_cache: Tensor, v_cache: Tensor) -> None:
    """Give values to slots that some query sees; all others keep NaN."""
    for run in runs:
        seen = torch.tensor(to_dense(run.mask, window, run.first, run.count, run.tree)).any(dim=0)
        for slot in seen.nonzero().flatten().tolist():
            place = run.block_table[slot // page_size] * page_size + slot % page_size
            k_cache[place] = torch.randn_like(k_cache[place])
            v_cache[place] = torch.randn_like(v_cache[place])
