"""Rows with different adapters in one pass: each gets what a model with its adapter merged gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.engine.engine import Engine
from split_llama.engine.low_rank import AdapterBank
from split_llama.layers import Block, FusedLinear, Segment
from split_llama.load import load_packed_segment, load_segment
from split_llama.lora import TARGETS, Adapter, LoraConfig, lora_shapes
from split_llama.products import Numerics

WHOLE = BlockRange(0, 4)
CPU = torch.device("cpu")
ADAPTERS = [
    LoraConfig(3, 6),
    LoraConfig(5, 1, target_modules=TARGETS, use_rslora=True),
    LoraConfig(2, 2, 0.0, ("up_proj",)),
]


def random_adapter(folder: Path, number: int, blocks: BlockRange = WHOLE) -> Adapter:
    generator = torch.Generator().manual_seed(number)
    shapes = lora_shapes(Checkpoint.open(folder).config, ADAPTERS[number], blocks)
    return Adapter(
        ADAPTERS[number], {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    )


def merged(folder: Path, adapter: Adapter | None) -> Segment:
    """The oracle: a dense segment with `W + scaling * B A` for its weights."""
    segment = load_segment(Checkpoint.open(folder), WHOLE, dtype=torch.float32, device=CPU)
    for name, weight in segment.stored_parts():
        a = (adapter.tensors if adapter else {}).get(name.replace(".weight", ".lora_A.weight"))
        if adapter is not None and a is not None:
            weight.data += adapter.lora.scaling * adapter.tensors[name.replace(".weight", ".lora_B.weight")] @ a
    return segment


def alone(segment: Segment, blocks: BlockRange, rows: Tensor) -> Tensor:
    engine = Engine(segment, num_pages=16)
    return engine.run(engine.plan([engine.sequence(blocks, 64).append(len(rows))]), rows)


def packed(folder: Path) -> Segment:
    return load_packed_segment(Checkpoint.open(folder), WHOLE, Numerics(torch.float32, "none", CPU))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_pass_of_many_adapters(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    folder = tiny_checkpoint(family=family)
    adapters = [random_adapter(folder, number) for number in range(3)]
    segment = packed(folder)
    engine = Engine(segment, num_pages=64, adapters=AdapterBank(segment, adapters))
    oracles = {number: merged(folder, adapters[number] if number >= 0 else None) for number in (-1, 0, 1, 2)}
    rides = [(0, WHOLE, 3), (-1, WHOLE, 2), (1, BlockRange(1, 3), 4), (0, BlockRange(2, 4), 1), (2, WHOLE, 1)]
    sequences = [engine.sequence(blocks, 64, number) for number, blocks, _ in rides]
    fed: list[list[Tensor]] = [[] for _ in rides]
    torch.manual_seed(3)
    for turn in range(3):
        rows = [torch.randn(count if turn == 0 else 1, 32) for _, _, count in rides]
        plan = engine.plan([sequence.append(len(part)) for sequence, part in zip(sequences, rows, strict=True)])
        outputs = engine.run(plan, torch.cat(rows)).split([len(part) for part in rows])
        for (number, blocks, _), before, part, output in zip(rides, fed, rows, outputs, strict=True):
            before.append(part)
            want = alone(oracles[number], blocks, torch.cat(before))[-len(part) :]
            torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-4)
            if number >= 0:
                plain = alone(oracles[-1], blocks, torch.cat(before))[-len(part) :]
                assert (output - plain).abs().max() > 1e-2, "the adapter matters"


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_update_is_added_to_whatever_the_stored_weights_give(
    tiny_checkpoint: TinyCheckpoint, weights: torch.dtype, quantization: str, rows: int
) -> None:
    folder = tiny_checkpoint()
    segment = load_packed_segment(Checkpoint.open(folder), WHOLE, Numerics(weights, quantization, CPU))
    adapter = random_adapter(folder, 1)
    bank = AdapterBank(segment, [adapter])
    layer = segment.layers[2]
    assert isinstance(layer, Block)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))
    plain = layer.mlp.gate_up_proj(x)
    with bank.over(WHOLE, [-1] * (rows - 1) + [0]):
        got = layer.mlp.gate_up_proj(x)
    tensors = {name.rpartition(".layers.2.mlp.")[2]: tensor for name, tensor in adapter.tensors.items()}
    parts = [
        x[-1] @ tensors[f"{part}.lora_A.weight"].T @ tensors[f"{part}.lora_B.weight"].T
        for part in ("gate_proj", "up_proj")
    ]
    assert torch.equal(got[:-1], plain[:-1])
    torch.testing.assert_close(got[-1] - plain[-1], adapter.lora.scaling * torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_forks_and_drafts_keep_their_adapter(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    adapter, segment = random_adapter(folder, 1), packed(folder)
    engine = Engine(segment, num_pages=64, adapters=AdapterBank(segment, [adapter]))
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    parent = engine.sequence(WHOLE, 64, 0)
    engine.run(engine.plan([parent.append(4)]), rows[:4])
    child = parent.fork(4)
    want = alone(merged(folder, adapter), WHOLE, rows)[-1:]
    for run in (child.append(1), parent.append_draft((1,))):
        torch.testing.assert_close(engine.run(engine.plan([run]), rows[4:]), want, rtol=1e-4, atol=1e-4)


def test_passes_without_adapters_do_not_come_near_them(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    segment = packed(folder)
    bank = AdapterBank(segment, [random_adapter(folder, 1)])
    engine = Engine(segment, num_pages=64, adapters=bank)
    hooks = [module for layer in segment.layers for module in layer.modules() if isinstance(module, FusedLinear)]
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with_adapter = engine.run(engine.plan([engine.sequence(WHOLE, 64, 0).append(3)]), rows)
    assert all(module.low_rank is None for module in hooks), "a pass leaves no hooks behind"
    for matrices in bank.matrices.values():
        for matrix in matrices:
            matrix.a.fill_(float("nan"))
    without = engine.run(engine.plan([engine.sequence(WHOLE, 64).append(3)]), rows)
    torch.testing.assert_close(without, alone(merged(folder, None), WHOLE, rows), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_adapter, without)


def test_a_failing_pass_leaves_no_hooks_and_foreign_ones_come_back(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    segment = packed(folder)
    bank = AdapterBank(segment, [random_adapter(folder, 0)])
    layer = segment.layers[1]
    assert isinstance(layer, Block)
    linear = layer.self_attn.qkv_proj

    def foreign(x: Tensor, out: Tensor) -> Tensor:
        return out

    linear.low_rank = foreign
    with pytest.raises(RuntimeError, match="size"), bank.over(WHOLE, [0]):
        segment(WHOLE, torch.zeros(1, 31), torch.zeros(1, dtype=torch.int64), None)
    assert linear.low_rank is foreign


def test_a_bank_holds_only_the_segments_blocks(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    segment = load_packed_segment(Checkpoint.open(folder), BlockRange(1, 3), Numerics(torch.float32, "none", CPU))
    bank = AdapterBank(segment, [random_adapter(folder, 0), random_adapter(folder, 2, BlockRange(2, 4))])
    assert {block: len(matrices) for block, matrices in bank.matrices.items()} == {1: 2, 2: 3}
    # q, k and v of rank 3 lie one below the other: 9 rows of 32, and 9 columns for 64 outputs; o has rank 3.
    of_block = 4 * 2 * (9 * 32 + 64 * 9 + 3 * 32 + 32 * 3)
    assert bank.nbytes == 2 * of_block + 4 * 2 * (2 * 32 + 96 * 2)
