"""Cache edits on the device do what the cache does itself, in fewer launches and in the same order."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import TinyModel

from serving.device.device import HostDevice
from serving.device.memory import HostArena
from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.kv_cache import KVCache
from split_llama.engine.pages import CacheEdit, CopyPage, MoveSlots, ZeroPages

PAGES, PAGE_SIZE = 24, 8


def random_edit(draw: random.Random) -> CacheEdit:
    match draw.randrange(3):
        case 0:
            return ZeroPages(tuple(draw.sample(range(PAGES), draw.randint(1, 3))))
        case 1:
            source, target = draw.sample(range(PAGES), 2)
            return CopyPage(source, target, draw.randint(1, PAGE_SIZE))
        case _:
            count = draw.choice([1, 2, 9])
            sources, targets = (tuple(draw.sample(range(PAGES * PAGE_SIZE), count)) for _ in range(2))
            return MoveSlots(sources, targets)


def make_cache(kv_dtype: torch.dtype | None) -> KVCache:
    config = ModelConfig.from_hf(TinyModel().config())
    cache = KVCache(
        config,
        BlockRange(1, 3),
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_dtype=kv_dtype,
    )
    generator = torch.Generator().manual_seed(4)
    for part in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        if part is not None:
            raw = part.view(torch.uint8)
            raw.copy_(torch.randint(0, 100, raw.shape, generator=generator, dtype=torch.uint8))
    return cache


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_any_edits_in_any_order(kv_dtype: torch.dtype | None) -> None:
    from serving.device.edits import apply_edits

    draw = random.Random(3)
    edits = tuple(random_edit(draw) for _ in range(25))
    want, got = make_cache(kv_dtype), make_cache(kv_dtype)
    untouched = got.k.view(torch.uint8).clone()
    want.apply(edits)
    device = HostDevice()
    apply_edits(edits, got, HostArena(device), device)
    assert not torch.equal(got.k.view(torch.uint8), untouched)
    for one, other in ((want.k, got.k), (want.v, got.v), (want.k_scale, got.k_scale), (want.v_scale, got.v_scale)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_edits_of_different_sequences_share_a_launch() -> None:
    from serving.device.edits import group_edits

    moves = [MoveSlots((8 * i + 2, 8 * i + 3), (8 * i + 1, 8 * i + 2)) for i in range(3)]
    zeros = [ZeroPages((5,)), ZeroPages((6, 7))]
    assert list(group_edits([*moves, *zeros, moves[0]])) == [moves, zeros, [moves[0]]]


def test_edits_that_build_on_each_other_stay_apart() -> None:
    from serving.device.edits import group_edits

    for first, second in [
        (CopyPage(1, 2, 8), CopyPage(2, 3, 8)),
        (CopyPage(1, 2, 8), CopyPage(4, 1, 8)),
        (CopyPage(1, 2, 8), CopyPage(4, 2, 3)),
        (MoveSlots((1,), (2,)), MoveSlots((2,), (3,))),
    ]:
        assert list(group_edits([first, second])) == [[first], [second]]
