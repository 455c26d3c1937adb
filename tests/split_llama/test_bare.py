"""The bare forward against the modules that it is made of."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyCheckpoint
from tiny_models import FAMILIES

from split_llama.bare import BareBlock, BareNorm
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.engine.engine import Engine
from split_llama.engine.kv_cache import Order
from split_llama.layers import RMSNorm, Segment
from split_llama.load import load_packed_segment, load_segment
from split_llama.products import Numerics

CPU = torch.device("cpu")


def outputs(segment: Segment, order: Order) -> torch.Tensor:
    """A prompt of 9 rows and then two rows one by one."""
    engine = Engine(segment, num_pages=4, kv_order=order)
    sequence = engine.sequence(engine.blocks, 64)
    states = torch.randn(11, segment.config.hidden_size, generator=torch.Generator().manual_seed(0))
    parts = [states[:9], states[9:10], states[10:]]
    return torch.cat([engine.run(engine.plan([sequence.append(len(part))]), part) for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_segment_computes_what_the_dense_one_does(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    checkpoint, blocks = Checkpoint.open(tiny_checkpoint(family=family)), BlockRange(1, 3)
    dense = load_segment(checkpoint, blocks, dtype=torch.float32, device=CPU)
    packed = load_packed_segment(checkpoint, blocks, Numerics(torch.float32, "none", CPU))
    assert all(isinstance(forward, BareBlock) for forward in packed.forwards)
    assert not any(isinstance(forward, BareBlock) for forward in dense.forwards)
    torch.testing.assert_close(outputs(packed, Order.HEADS), outputs(dense, Order.PAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e4])
def test_the_norm_is_exact_for_rows_of_any_size(size: float) -> None:
    norm = RMSNorm(64, 1e-6, torch.float32, CPU)
    norm.weight.copy_(torch.randn(64))
    x = torch.randn(3, 64) * size
    x[1] = 0.0
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    torch.testing.assert_close(BareNorm(norm)(x).double(), exact, rtol=2e-6, atol=0.0)
