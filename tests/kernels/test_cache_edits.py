from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.cache_edits.kernel import copy_page, move_slots, zero_pages
from kernels.limits import MAX_TREE_NODES
from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.kv_cache import KVCache
from split_llama.engine.pages import CopyPage, MoveSlots, ZeroPages
from tests.kernels.kernel_checks import check_benchmark, check_cache_edits, check_far_edits

TinyCheckpoint = Callable[..., Path]
STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 8), (3, 80)])
def test_kernel_gives_what_the_reference_gives(storage: torch.dtype, kv_heads: int, head_dim: int) -> None:
    check_cache_edits("cpu", storage, blocks=2, page_size=8, kv_heads=kv_heads, head_dim=head_dim)


def test_slots_that_are_no_whole_number_of_words() -> None:
    check_cache_edits("cpu", torch.int8, blocks=2, page_size=8, kv_heads=1, head_dim=7)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 8), (8, 64), (2, 80), (8, 128)])
def test_every_geometry(storage: torch.dtype, page_size: int, kv_heads: int, head_dim: int) -> None:
    check_cache_edits("cpu", storage, blocks=3, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim)


def test_they_do_what_the_engines_cache_does(tiny_checkpoint: TinyCheckpoint) -> None:
    config = ModelConfig.from_hf(json.loads((tiny_checkpoint() / "config.json").read_text()))
    cache = KVCache(config, BlockRange(1, 3), num_pages=4, page_size=8, dtype=torch.float32, device=torch.device("cpu"))
    cache.k.copy_(torch.randn_like(cache.k))
    cache.v.copy_(torch.randn_like(cache.v))
    k, v = cache.k.clone(), cache.v.clone()
    cache.apply((MoveSlots((12, 13, 15), (11, 12, 13)), CopyPage(1, 2, 5), ZeroPages((0, 3))))
    move_slots(k, v, torch.tensor([[12, 13, 15]]), torch.tensor([[11, 12, 13]]))
    copy_page(k, v, torch.tensor([[1, 2, 5]]))
    zero_pages(k, v, torch.tensor([0, 3]))
    assert torch.equal(k, cache.k)
    assert torch.equal(v, cache.v)


def test_a_whole_tree_moves_at_once() -> None:
    shape = (1, 20, 8, 1, 4)
    k, v = torch.randn(shape), torch.randn(shape)
    before = k.clone()
    sources = torch.arange(40, 40 + MAX_TREE_NODES)[None]
    move_slots(k, v, sources, sources - 1)
    assert torch.equal(k.flatten(1, 2)[0, 39 : 39 + MAX_TREE_NODES], before.flatten(1, 2)[0, sources[0]])


def test_more_moves_than_a_tree_has_nodes_are_refused() -> None:
    k = torch.zeros(1, 20, 8, 1, 4)
    moves = torch.zeros(1, MAX_TREE_NODES + 1, dtype=torch.int64)
    with pytest.raises(AssertionError, match="at most 64"):
        move_slots(k, k.clone(), moves, moves)


def test_no_edits_launch_nothing() -> None:
    k = torch.ones(1, 2, 8, 1, 4)
    none = torch.zeros(0, 3, dtype=torch.int64)
    copy_page(k, k.clone(), none)
    zero_pages(k, k.clone(), none[:, 0])
    move_slots(k, k.clone(), none, none)
    assert (k == 1).all()


def test_the_benchmark_runs() -> None:
    check_benchmark("cache_edits")


def test_offsets_beyond_two_gigabytes() -> None:
    check_far_edits("cpu", pages=2**31 // (16 * 1024) + 2)
