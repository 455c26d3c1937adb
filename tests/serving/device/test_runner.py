"""The runner gives what the engine gives in plain PyTorch, by graphs and without."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from split_llama.config import BlockRange

MakeRig = Callable[..., Any]
EVERY_RANGE = [BlockRange(1, 2), BlockRange(1, 3), BlockRange(2, 3)]
ONE_BLOCK = BlockRange(1, 2)
TREE = (0b1, 0b11, 0b101, 0b1101, 0b10001)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"graphs": False},
        {"family": "mistral", "sliding_window": 9},
        {"family": "qwen3"},
        {"family": "qwen2", "kv_heads": 1},
        {"overrides": {"attention_bias": True, "mlp_bias": True}},
        {"family": "qwen3", "overrides": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}},
    ],
    ids=str,
)
def test_prompts_and_decodes(make_rig: MakeRig, geometry: dict[str, Any]) -> None:
    rig = make_rig(**geometry)
    pairs = [rig.pair() for _ in range(3)]
    rig.step(pairs, [40, 5, 17])
    for _ in range(3):
        rig.step(pairs, [1, 1, 1])


def test_every_kernel_together(make_rig: MakeRig) -> None:
    rig = make_rig(kernels=True, family="qwen3")
    pairs = [rig.pair() for _ in range(2)]
    rig.step(pairs, [9, 2])
    rig.step(pairs, [1, 1])
    rig.step(pairs, [1, 1])
    assert len(rig.runner.graphs.captured) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(make_rig: MakeRig, dtype: torch.dtype) -> None:
    rig = make_rig(dtype=dtype)
    pairs = [rig.pair() for _ in range(2)]
    rig.step(pairs, [40, 3])
    rig.step(pairs, [1, 1])


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_pages(make_rig: MakeRig, kv_dtype: torch.dtype) -> None:
    rig = make_rig(kernels=True, engine={"kv_dtype": kv_dtype})
    pair = rig.pair()
    rig.step([pair], [5])
    draft = [[sequence.append_draft(TREE)] for sequence in pair]
    rig.compare(draft)
    for sequence in pair:
        sequence.accept((0, 2, 3))
    rig.step([pair], [1])
    twin = [sequence.fork(6) for sequence in pair]
    rig.step([pair, twin], [1, 1])


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_lengths_around_page_boundaries(make_rig: MakeRig, page_size: int) -> None:
    rig = make_rig(engine={"page_size": page_size})
    pairs = rig.pretend([page_size - 2, page_size - 1, 2 * page_size])
    for _ in range(4):
        rig.step(pairs, [1, 1, 1])


def test_drafts_are_verified_and_accepted(make_rig: MakeRig) -> None:
    rig = make_rig()
    drafting, decoding = rig.pair(), rig.pair()
    rig.step([drafting, decoding], [21, 30])
    for accepted in ((0, 2, 3), (0,), (0, 1)):
        both = [[drafting[side].append_draft(TREE), decoding[side].append(1)] for side in range(2)]
        rig.compare(both)
        for sequence in drafting:
            sequence.accept(accepted)
    rig.step([drafting, decoding], [2, 1])
    chain = [[sequence.append_draft((0b1, 0b11, 0b111))] for sequence in drafting]
    rig.compare(chain)
    for sequence in drafting:
        sequence.truncate(sequence.committed + 2)
    rig.step([drafting, decoding], [1, 1])


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sessions_with_other_blocks_ride_along(make_rig: MakeRig, family: str, graphs: bool) -> None:
    rig = make_rig(family=family, graphs=graphs)
    pairs = [rig.pair(blocks) for blocks in EVERY_RANGE]
    rig.step(pairs, [1, 5, 40])
    for _ in range(3):
        rig.step(pairs, [1, 2, 1])
    if graphs:
        assert [capacity.mixed for capacity in rig.runner.graphs.captured] == [True]


def test_forks_and_rollbacks(make_rig: MakeRig) -> None:
    rig = make_rig()
    parent = rig.pair()
    rig.step([parent], [21])
    child = [sequence.fork(19) for sequence in parent]
    rig.step([parent, child], [3, 3])
    for sequence in (*parent, *child):
        sequence.truncate(18)
    rig.step([parent, child], [1, 1])
    for sequence in parent:
        sequence.free()
    heirs = rig.pair()
    rig.step([child, heirs], [1, 33])
    rig.step([child, heirs], [1, 1])


def test_several_runs_of_one_sequence_in_a_pass(make_rig: MakeRig) -> None:
    rig = make_rig()
    pair = rig.pair()
    both = [[sequence.append(count) for count in (7, 1, 3)] for sequence in pair]
    rig.compare(both)


def test_a_graph_serves_other_lengths_than_it_was_captured_with(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=128)
    pairs = rig.pretend([3, 2, 1, 130, 17, 48])
    for _ in range(2):
        rig.step(pairs[:3], [1, 1, 1])
    captured = rig.runner.graphs.captured
    assert len(captured) == 1
    rig.step(pairs[3:], [1, 1, 1])
    rig.step([*pairs[:2], rig.pair()], [1, 1, 1])
    rig.step([pairs[0], pairs[3], rig.pair(), rig.pair()], [1, 1, 1, 1])
    assert rig.runner.graphs.captured == captured


def test_long_contexts_are_split_and_joined(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=ONE_BLOCK, num_pages=128)
    long, short = rig.pretend([510, 4])
    for _ in range(4):
        rig.step([long, short], [1, 1])
    rig.compare([[long[side].append_draft(TREE), short[side].append(1)] for side in range(2)])


def test_padding_never_reaches_a_result(make_rig: MakeRig) -> None:
    rig = make_rig()
    pairs = [rig.pair() for _ in range(3)]
    rig.step(pairs, [3, 2, 1])
    for _ in range(3):
        rig.runner.graphs._states.fill_(float("nan"))
        rig.runner.graphs._outputs.fill_(float("nan"))
        rig.step(pairs, [1, 1, 1])
    assert rig.runner.graphs.captured[0].rows == 4
    used = {page for pair in pairs for page in pair[1].block_table}
    unused = [page for page in range(64) if page not in used]
    before = rig.cache.k[:, unused].clone()
    rig.step(pairs, [1, 1, 1])
    assert torch.equal(rig.cache.k[:, unused].view(torch.int32), before.view(torch.int32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a row that passes by computes with infinities
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e38])
def test_garbage_in_pages_that_are_not_visible_changes_nothing(make_rig: MakeRig, garbage: float) -> None:
    rig = make_rig()
    for cache in (rig.cache.k, rig.cache.v):
        cache.fill_(garbage)
    pairs = [rig.pair(blocks) for blocks in EVERY_RANGE]
    rig.step(pairs, [1, 5, 20])
    for _ in range(3):
        rig.step(pairs, [1, 1, 1])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_is_bitwise_the_same_alone_and_among_others(make_rig: MakeRig, family: str) -> None:
    from serving.device.device import HostDevice
    from serving.device.executor import TritonAttention

    rig = make_rig(family=family, num_pages=256)
    segment, cache = rig.device.segment, rig.cache
    attention = TritonAttention(segment, HostDevice())
    draw = random.Random(5)
    torch.manual_seed(5)
    cache.k.normal_()
    cache.v.normal_()
    sequences = [rig.device.sequence(BlockRange(1, 3), 512) for _ in range(32)]
    lengths = [draw.choice([1, 15, 16, 17, 60]) for _ in sequences]
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.append(length)
    runs = [
        sequence.append_draft(TREE) if index % 5 == 0 else sequence.append(draw.choice([1, 1, 3]))
        for index, sequence in enumerate(sequences)
    ]
    rows = sum(run.count for run in runs)
    q_NHK, k_NGK, v_NGK = torch.randn(rows, 4, 8), torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
    windows = segment.config.sliding_windows
    together = attention.plan(runs, cache, windows)(2, q_NHK, k_NGK, v_NGK)
    start = 0
    for run in runs:
        part = slice(start, start + run.count)
        alone = attention.plan([run], cache, windows)(2, q_NHK[part], k_NGK[part], v_NGK[part])
        assert torch.equal(alone, together[part])
        start += run.count


def test_warm_up_captures_decoding_and_leaves_pages_alone(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=ONE_BLOCK, num_pages=4)
    rig.cache.k.fill_(7.0)
    rig.runner.warm_up(seconds=1e9)
    assert torch.all(rig.cache.k == 7.0)
    captured = rig.runner.graphs.captured
    assert {capacity.rows for capacity in captured} == {1, 2, 4, 8}
    rig.step([rig.pair() for _ in range(3)], [1, 1, 1])
    assert rig.runner.graphs.captured == captured


def test_warm_up_ends_in_time(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=ONE_BLOCK)
    rig.runner.warm_up(seconds=0.0)
    assert len(rig.runner.graphs.captured) <= 1


@pytest.mark.parametrize("most", [1, 3, 8, 100, 512])
def test_the_ladder_ends_at_the_most_rows(most: int) -> None:
    from serving.device.graphs import row_ladder

    ladder = row_ladder(most)
    assert ladder[-1] == most
    assert list(ladder) == sorted(set(ladder))
    # Padding to the next step at most doubles a pass.
    assert all(upper <= 2 * lower for lower, upper in itertools.pairwise(ladder))


def test_a_pass_fits_into_the_step_chosen_for_it(make_rig: MakeRig) -> None:
    from kernels.paged_attention.planner import Tiles
    from serving.device.graphs import LEAST_PAGES
    from serving.device.inputs import Capacity, LaunchCapacity

    graphs = make_rig(blocks=ONE_BLOCK).runner.graphs
    tiles = Tiles(16, 32)
    needs = Capacity(19, 7, 272, (LaunchCapacity(tiles, 33, 5),), mixed=True)
    assert graphs.fit(needs) == Capacity(24, 24, 512, (LaunchCapacity(tiles, 64, 64),), mixed=True)
    least = graphs.fit(Capacity(1, 1, 16, (LaunchCapacity(tiles, 1, 0),), mixed=False))
    assert least == Capacity(1, 1, LEAST_PAGES, (LaunchCapacity(tiles, 1, 1),), mixed=False)


def test_a_pass_without_a_graph_of_its_shape_runs_anyway(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.device import graphs

    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    rig = make_rig(blocks=ONE_BLOCK)
    pairs = [rig.pair() for _ in range(3)]
    for count in (1, 1, 1, 2, 2, 2):
        rig.step(pairs[: count + 1], [1] * (count + 1))
    assert [capacity.rows for capacity in rig.runner.graphs.captured] == [2]
