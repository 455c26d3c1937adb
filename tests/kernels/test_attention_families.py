"""Every mask family against the dense reference, through pages, tiles and splits, in the interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kernels.paged_attention import planner
from kernels.paged_attention.planner import Tiles
from tests.kernels.attention_cases import FAMILIES, Heads, assert_matches, attend_batch, make_batch

GROUPS = {"MHA": 1, "GQA": 3}
PAGES = (8, 16, 64)
KEYS = (16, 32, 64)
SPLITS = (1, 3)
MATRIX = list(product(FAMILIES, GROUPS, PAGES, KEYS, SPLITS))
# Coprime with the matrix's inner sizes, so that each family meets every value of every axis.
STRIDE = 7


def check(family: str, heads: str, page_size: int, keys: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch over three sequences whose lengths are a page boundary's, one less and one more."""
    # Small chunks stand for long contexts: the interpreter takes milliseconds a tile.
    chunk = 64
    monkeypatch.setattr(planner, "CHUNK", chunk)
    window, run = FAMILIES[family]
    length = (splits - 1) * chunk + page_size
    batch = make_batch(
        [run(length + off) for off in (-1, 0, 1)],
        Heads(group=GROUPS[heads], head_dim=8, page_size=page_size),
        window=window,
        seed=length,
    )
    assert_matches(attend_batch(batch, Tiles(16, keys)), batch)


@pytest.mark.parametrize(("family", "heads", "page_size", "keys", "splits"), MATRIX[::STRIDE])
def test_families(
    family: str, heads: str, page_size: int, keys: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, heads, page_size, keys, splits, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "heads", "page_size", "keys", "splits"), [case for at, case in enumerate(MATRIX) if at % STRIDE]
)
def test_families_in_full(
    family: str, heads: str, page_size: int, keys: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, heads, page_size, keys, splits, monkeypatch)


def test_the_slice_of_the_matrix_meets_every_value() -> None:
    for axis in range(5):
        assert {case[axis] for case in MATRIX[::STRIDE]} == {case[axis] for case in MATRIX}


@pytest.mark.parametrize("tiles", [Tiles(16, 32), Tiles(64, 16)])
def test_all_families_in_one_launch(tiles: Tiles) -> None:
    runs = [run(length) for _, run in FAMILIES.values() for length in (1, 50)]
    batch = make_batch(runs, Heads(), window=21)
    assert_matches(attend_batch(batch, tiles), batch)


def test_split_at_512_slots() -> None:
    runs = [FAMILIES[name][1](length) for name, length in (("decode", 1030), ("tree", 510), ("sinks and window", 700))]
    batch = make_batch(runs, Heads(kv_heads=1), window=600)
    assert_matches(attend_batch(batch, Tiles(32, 64)), batch)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_dims_and_types(head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "CHUNK", 64)
    runs = [FAMILIES["decode"][1](70), FAMILIES["tree"][1](33)]
    batch = make_batch(runs, Heads(head_dim=head_dim, dtype=dtype, kv_dtype=dtype))
    assert_matches(attend_batch(batch, Tiles(16, 32)), batch)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantised_pages(kv_dtype: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "CHUNK", 64)
    runs = [FAMILIES["decode"][1](130), FAMILIES["tree"][1](33), FAMILIES["chunked prefill"][1](17)]
    batch = make_batch(runs, Heads(head_dim=32, dtype=dtype, kv_dtype=kv_dtype))
    assert_matches(attend_batch(batch, Tiles(16, 32)), batch)
