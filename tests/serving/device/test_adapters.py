"""Adapters through the runner: graphs and eager passes give what plain PyTorch gives, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from split_llama.config import BlockRange
from split_llama.lora import TARGETS, LoraConfig

MakeRig = Callable[..., Any]
ADAPTERS = [LoraConfig(3, 6), LoraConfig(5, 2, target_modules=TARGETS), LoraConfig(2, 2, target_modules=("up_proj",))]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_of_many_adapters_and_none(make_rig: MakeRig, family: str, graphs: bool) -> None:
    rig = make_rig(family=family, graphs=graphs, adapters=ADAPTERS)
    pairs = [rig.pair(adapter=number) for number in (0, -1, 1, 2, 0)]
    rig.step(pairs, [20, 5, 1, 3, 2])
    for _ in range(3):
        rig.step(pairs, [1, 1, 1, 1, 1])
    if graphs:
        assert [capacity.adapted for capacity in rig.runner.graphs.captured] == [True]


def test_the_kernels_themselves(make_rig: MakeRig) -> None:
    rig = make_rig(kernels=True, adapters=ADAPTERS[:2])
    pairs = [rig.pair(adapter=number) for number in (1, -1, 0)]
    rig.step(pairs, [4, 2, 1])
    for _ in range(2):
        rig.step(pairs, [1, 1, 1])
    assert len(rig.runner.graphs.captured) == 1


def test_more_ranks_than_the_kernel_takes_at_once(make_rig: MakeRig) -> None:
    from serving.device.adapters import MOST_RANKS

    # Q, K and V have theirs side by side: 90 here.
    wide = LoraConfig(30, 15)
    assert 3 * wide.r > MOST_RANKS
    rig = make_rig(kernels=True, blocks=BlockRange(1, 2), adapters=[LoraConfig(2, 2), wide])
    rig.step([rig.pair(adapter=1), rig.pair(adapter=0)], [2, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(make_rig: MakeRig, dtype: torch.dtype) -> None:
    rig = make_rig(dtype=dtype, adapters=ADAPTERS)
    pairs = [rig.pair(adapter=number) for number in (0, 1)]
    rig.step(pairs, [9, 3])
    rig.step(pairs, [1, 1])


def test_sessions_with_other_blocks_ride_along(make_rig: MakeRig) -> None:
    rig = make_rig(adapters=ADAPTERS)
    pairs = [rig.pair(BlockRange(*blocks), adapter) for blocks, adapter in (((1, 2), 0), ((1, 3), 1), ((2, 3), -1))]
    for _ in range(4):
        rig.step(pairs, [1, 2, 1])


def test_passes_without_adapters_have_graphs_of_their_own(make_rig: MakeRig) -> None:
    rig = make_rig(adapters=ADAPTERS[:1])
    plain, tuned = rig.pair(), rig.pair(adapter=0)
    rig.step([plain], [3])
    rig.step([tuned], [3])
    for pairs in ([plain], [plain], [tuned], [tuned], [plain, tuned], [plain, tuned], [plain], [tuned]):
        rig.step(pairs, [1] * len(pairs))
    assert [(one.rows, one.adapted) for one in rig.runner.graphs.captured] == [(1, False), (1, True), (2, True)]


def test_an_adapter_changes_the_outputs(make_rig: MakeRig) -> None:
    rig = make_rig(adapters=ADAPTERS[:1])
    states = torch.randn(3, 32)
    outputs = []
    for adapter in (-1, 0):
        pair = rig.pair(adapter=adapter)
        want, got = rig.run([[sequence.append(3)] for sequence in pair], states)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        outputs.append(got)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_warm_up_captures_passes_with_adapters_too(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=BlockRange(1, 2), num_pages=4, adapters=ADAPTERS[:1])
    rig.runner.warm_up(seconds=1e9)
    captured = rig.runner.graphs.captured
    assert {(one.rows, one.adapted) for one in captured} == {(n, adapted) for n in (1, 2, 4, 8) for adapted in (0, 1)}
    rig.step([rig.pair(adapter=0)], [1])
    assert rig.runner.graphs.captured == captured
