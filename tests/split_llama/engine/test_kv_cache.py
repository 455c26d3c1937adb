"""The KV cache: storage types and their errors, edits in every type, and the way to host memory and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.engine import Engine
from split_llama.engine.kv_cache import KV_DTYPES, KVCache, Order, dequantise, kv_page_bytes, quantise
from split_llama.engine.pages import CacheEdit, CopyPage, DropSwap, MoveSlots, PagePool, SwapIn, SwapOut, ZeroPages
from split_llama.engine.sequence import Sequence
from split_llama.load import load_embedding, load_head, load_segment

CPU = torch.device("cpu")
STORED = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
BLOCKS = BlockRange(1, 3)


@pytest.fixture
def config(tiny_checkpoint: TinyCheckpoint) -> ModelConfig:
    return Checkpoint.open(tiny_checkpoint()).config


CacheOf = Callable[..., KVCache]


@pytest.fixture(params=Order, ids=lambda order: order.name)
def cache_of(request: pytest.FixtureRequest) -> CacheOf:
    """Make a cache, in either order of its memory."""

    def make(config: ModelConfig, stored: torch.dtype, pages: int = 6, swap: int = 0) -> KVCache:
        places: dict[str, Any] = {"num_pages": pages, "page_size": 4, "swap_pages": swap, "order": request.param}
        return KVCache(config, BLOCKS, dtype=torch.float32, device=CPU, kv_dtype=stored, **places)

    return make


def fill(cache: KVCache, config: ModelConfig, pages: int = 6) -> None:
    """Write rows into every slot."""
    shape = (pages * 4, config.num_key_value_heads, config.head_dim)
    for block in (1, 2):
        cache.write(block, torch.arange(pages * 4), torch.randn(shape), torch.randn(shape))


def contents(cache: KVCache) -> list[Tensor]:
    """All that is stored, as bytes, `[blocks, pages, page_size, ...]`."""
    parts = [part for part in (cache.k, cache.v, cache.k_scale, cache.v_scale) if part is not None]
    return [part.view(torch.uint8).clone() for part in parts]


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_page_takes_the_bytes_it_is_said_to(cache_of: CacheOf, config: ModelConfig, stored: torch.dtype) -> None:
    cache = cache_of(config, stored)
    assert sum(part.nbytes for part in contents(cache)) == 6 * kv_page_bytes(config, 2, 4, stored)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("slots", [slice(5, 14), torch.tensor([7, 0, 22, 13])], ids=["slice", "gather"])
def test_what_was_written_is_read_in_the_compute_type(
    cache_of: CacheOf, config: ModelConfig, stored: torch.dtype, slots: slice | Tensor
) -> None:
    cache = cache_of(config, stored)
    rows = {}
    for block in (1, 2):
        rows[block] = torch.randn(2, 24, config.num_key_value_heads, config.head_dim)
        cache.write(block, torch.arange(24).flip(0), *rows[block].flip(1))
    for block in (1, 2):
        for got, rows_SGK in zip(cache.read(block, slots), rows[block], strict=True):
            want = rows_SGK[slots]
            assert got.dtype == torch.float32
            if stored in (torch.int8, torch.float8_e4m3fn):
                assert torch.equal(got, dequantise(*quantise(want, stored)))
            else:
                assert torch.equal(got, want.to(stored).float())


def test_a_slice_of_plain_values_is_a_view(cache_of: CacheOf, config: ModelConfig) -> None:
    cache = cache_of(config, torch.float32)
    assert cache.read(2, slice(3, 9))[1].data_ptr() == cache.block(2)[1][3].data_ptr()


finite = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(deadline=None)
@given(st.lists(finite | st.floats(-4, 4, width=32) | st.just(0.0), min_size=8, max_size=8))
def test_int8_is_half_a_step_off_at_most(values: list[float]) -> None:
    row = torch.tensor([values])
    stored, scale = quantise(row, torch.int8)
    assert (dequantise(stored, scale) - row).abs().max() <= 0.5 * scale.max() * (1 + 1e-5) + 1e-44
    assert stored.abs().max() <= 127
    assert float(scale) == pytest.approx(row.abs().max().item() / 127, rel=1e-6, abs=2e-45)


@settings(deadline=None)
@given(st.lists(finite | st.floats(-4, 4, width=32) | st.just(0.0), min_size=8, max_size=8))
def test_fp8_is_one_part_in_sixteen_off_at_most(values: list[float]) -> None:
    row = torch.tensor([values])
    stored, scale = quantise(row, torch.float8_e4m3fn)
    # Three bits of mantissa; below 2**-6 steps of 2**-9.
    bound = torch.maximum(row.abs() / 16, scale[:, None] * 2**-10) * (1 + 1e-5) + 1e-44
    assert ((dequantise(stored, scale) - row).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_zeros_stay_zeros_and_what_is_not_finite_does_not_pass_for_a_number(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [3.0, -1.5]])
    stored, scale = quantise(rows, dtype)
    back = dequantise(stored, scale)
    assert torch.equal(back[0], torch.zeros(2))
    assert scale[0] == 0
    assert not back[1:3].isfinite().all(dim=1).any()
    assert torch.allclose(back[3], rows[3], rtol=0.04)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_edits_move_values_and_scales_alike(cache_of: CacheOf, config: ModelConfig, stored: torch.dtype) -> None:
    cache = cache_of(config, stored, swap=4)
    fill(cache, config)
    want = contents(cache)
    edits: list[CacheEdit] = [
        CopyPage(0, 3, slots=2),
        MoveSlots((0, 1, 2), (1, 2, 0)),
        SwapOut((5, 1, 2), 0),
        SwapOut((0,), 1),
        ZeroPages((1, 5)),
        SwapIn(0, (2, 4, 1)),
        DropSwap(1),
        SwapOut((4, 3, 2), 2),
        ZeroPages((3,)),
        SwapIn(2, (0, 3, 2)),
    ]
    for part in want:
        part[:, 3, :2] = part[:, 0, :2]
        part[:, 0, [1, 2, 0]] = part[:, 0, [0, 1, 2]]
        away = part[:, [5, 1, 2]].clone()
        part[:, [1, 5]] = 0
        part[:, [2, 4, 1]] = away
        part[:, [0, 3, 2]] = part[:, [4, 3, 2]]
    cache.apply(tuple(edits))
    for got, expected in zip(contents(cache), want, strict=True):
        assert torch.equal(got, expected)


def test_a_failed_edit_leaves_the_others_whole(
    cache_of: CacheOf, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(config, torch.float32, swap=4)
    fill(cache, config)
    want = contents(cache)
    real = cache._swap._copy

    def failing(*arguments: Any) -> None:
        if arguments[0] is cache._swap._near and arguments[1] == (2,):
            raise RuntimeError("no memory")
        real(*arguments)

    monkeypatch.setattr(cache._swap, "_copy", failing)
    edits: tuple[CacheEdit, ...] = (SwapOut((1,), 0), SwapOut((2,), 1), SwapOut((3,), 2), ZeroPages((1, 2, 3)))
    with pytest.raises(RuntimeError, match="no memory"):
        cache.apply(edits)
    assert [cache.holds(ticket) for ticket in range(3)] == [True, False, True]
    cache.settle(edits)
    cache.apply((DropSwap(1), SwapIn(0, (3,)), SwapIn(2, (1,)), SwapOut((0, 1, 3, 4), 3)))
    for got, old in zip(contents(cache), want, strict=True):
        assert torch.equal(got[:, [3, 1]], old[:, [1, 3]])
        assert not got[:, 2].any()


def test_swaps_of_a_plan_that_failed_early_are_made_up_for_once(cache_of: CacheOf, config: ModelConfig) -> None:
    cache = cache_of(config, torch.float32, swap=4)
    fill(cache, config)
    want = contents(cache)
    cache.apply((SwapOut((4,), 0),))
    edits: tuple[CacheEdit, ...] = (
        SwapOut((1, 2), 1),
        ZeroPages((1, 2)),
        SwapIn(0, (1,)),
        SwapOut((3,), 2),
        DropSwap(2),
    )
    cache.settle(edits)
    fill(cache, config)
    later = contents(cache)
    # The plan had been carried out after all, or is settled twice: nothing is overwritten.
    cache.settle(edits)
    for got, before in zip(contents(cache), later, strict=True):
        assert torch.equal(got, before)
    assert [cache.holds(ticket) for ticket in range(3)] == [False, True, False]
    cache.apply((SwapIn(1, (0, 5)),))
    for got, before in zip(contents(cache), want, strict=True):
        assert torch.equal(got[:, [0, 5]], before[:, [1, 2]])


def generate(engine: Engine, sequence: Sequence, parts: Any, prompt: list[int], count: int, **swaps: Any) -> Any:
    """Greedy tokens and their logits; `swap_at` tokens are made after a stay in host memory."""
    embedding, head = parts
    tokens, all_logits, new = [], [], prompt
    for made in range(count):
        if made in swaps.get("swap_at", ()):
            sequence.swap_out()
            other = engine.sequence(sequence.blocks, 100)
            rows = torch.randn(30, engine.segment.config.hidden_size)
            engine.run(engine.plan([other.append(30)]), rows)
            sequence.swap_in()
            other.free()
        states = engine.run(engine.plan([sequence.append(len(new))]), embedding(torch.tensor(new)))
        all_logits.append(head(states[-1:])[0])
        new = [int(all_logits[-1].argmax())]
        tokens += new
    return tokens, torch.stack(all_logits)


@pytest.fixture(scope="module")
def model(data_dir: Any) -> Any:
    """A trained model as one segment, with embedding and head: a random one has no margins worth comparing."""
    checkpoint = Checkpoint.open(data_dir / "stories260K")
    placed: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    whole = BlockRange(0, checkpoint.config.num_hidden_layers)
    embedding = load_embedding(checkpoint, **placed)
    return load_segment(checkpoint, whole, **placed), (embedding, load_head(checkpoint, **placed))


PROMPT = [1, 403, 407, 261, 378, 432, 417, 266]


@pytest.mark.parametrize(
    ("stored", "error", "agreement"),
    [("fp16", 0.001, 0.99), ("bf16", 0.008, 0.98), ("int8", 0.04, 0.95), ("fp8", 0.08, 0.92)],
)
def test_a_stored_type_costs_little(model: Any, stored: str, error: float, agreement: float) -> None:
    """The same tokens forced through: the logits' error against float32, and how often the likeliest token agrees."""
    segment, (embedding, head) = model
    exact = Engine(segment, num_pages=40)
    tokens, _ = generate(exact, exact.sequence(segment.blocks, 300), model[1], PROMPT, 200)
    fed = embedding(torch.tensor(PROMPT + tokens))

    def forced(kv_dtype: torch.dtype) -> Tensor:
        engine = Engine(segment, num_pages=40, kv_dtype=kv_dtype)
        sequence = engine.sequence(segment.blocks, 300)
        rows = [engine.run(engine.plan([sequence.append(1)]), row[None]) for row in fed]
        out: Tensor = head(torch.cat(rows))
        return out

    want, got = forced(torch.float32), forced(KV_DTYPES[stored])
    off = ((got - want).norm(dim=1) / want.norm(dim=1)).mean()
    same = (got.argmax(dim=1) == want.argmax(dim=1)).float().mean()
    assert 0 < off < error
    assert same >= agreement


@pytest.mark.parametrize("stored", ["fp32", "bf16", "int8", "fp8"])
def test_a_stay_in_host_memory_changes_no_bit(model: Any, stored: str) -> None:
    segment, parts = model
    engine = Engine(segment, num_pages=10, kv_dtype=KV_DTYPES[stored], swap_pages=10)
    stayed, moved = engine.sequence(segment.blocks, 150), engine.sequence(segment.blocks, 150)
    tokens, logits = generate(engine, stayed, parts, PROMPT, 60)
    stayed.free()
    got_tokens, got = generate(engine, moved, parts, PROMPT, 60, swap_at=(1, 9, 10, 40))
    assert got_tokens == tokens
    assert torch.equal(got, logits)
    moved.free()
    engine.pool.check_integrity([])


def test_a_forks_shared_pages_stay_with_the_other(model: Any) -> None:
    segment, parts = model
    engine = Engine(segment, num_pages=12, swap_pages=4)
    parent = engine.sequence(segment.blocks, 100)
    generate(engine, parent, parts, PROMPT, 20)
    child, twin = parent.fork(25), parent.fork(25)
    plain, logits = generate(engine, twin, parts, [5], 15)
    twin.free()
    child.swap_out()
    assert (engine.pool.num_used, engine.pool.num_swapped) == (2, 2)
    generate(engine, parent, parts, [7], 5)
    parent.free()
    rows = torch.randn(100, segment.config.hidden_size)
    filler = engine.sequence(segment.blocks, 200)
    engine.run(engine.plan([filler.append(100)]), rows)
    child.swap_in()
    got, got_logits = generate(engine, child, parts, [5], 15)
    assert got == plain
    assert torch.equal(got_logits, logits)


def test_host_memory_is_given_back_however_a_sequence_ends() -> None:
    pool = PagePool(8, 4, swap_pages=4)
    for _ in range(3):
        sequence = Sequence(pool, BLOCKS, 40)
        sequence.append(14)
        sequence.swap_out()
        assert not pool.can_swap(1)
        sequence.free()
        assert pool.can_swap(4)
    pool.check_integrity([])
