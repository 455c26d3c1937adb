"""The runner in Triton's interpreter, on CPU tensors, beside the engine's own PyTorch path."""

from __future__ import annotations

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before tests/serving/device could turn its interpreter on: run them apart")

# Before anything imports triton: kernels become interpreted functions when they are decorated.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, write_model
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.engine.engine import Engine
from split_llama.engine.low_rank import NO_ADAPTER, AdapterBank
from split_llama.engine.plan import SequenceRun
from split_llama.layers import Segment
from split_llama.load import load_segment
from split_llama.lora import Adapter, LoraConfig, lora_shapes

HOSTED = BlockRange(1, 3)
HIDDEN = 32


def random_adapters(segment: Segment, configs: Sequence[LoraConfig]) -> list[Adapter]:
    """An adapter of random weights for each configuration, `lora_B` too, so that they matter."""
    adapters = []
    for config in configs:
        shapes = lora_shapes(segment.config, config, segment.blocks)
        adapters.append(Adapter(config, {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}))
    return adapters


class Rig:
    """Two engines over the same blocks: `oracle` in plain PyTorch, `device` through the runner.

    A test does the same with the sequences of both, which are kept in pairs.
    """

    def __init__(
        self,
        folder: Path,
        blocks: BlockRange,
        dtype: torch.dtype,
        graphs: bool,
        num_pages: int,
        adapters: Sequence[LoraConfig] = (),
        **engine: Any,
    ) -> None:
        from serving.device.executor import TritonExecutor
        from serving.device.graphs import Most
        from serving.device.runner import Runner

        checkpoint = Checkpoint.open(folder)
        segment = load_segment(checkpoint, blocks, dtype=dtype, device=torch.device("cpu"))
        bank = AdapterBank(segment, random_adapters(segment, adapters)) if adapters else None
        self.oracle, self.device = (Engine(segment, num_pages=num_pages, adapters=bank, **engine) for _ in range(2))
        self.cache = self.device.cache
        for engine in (self.oracle, self.device):
            # Unused memory may hold infinities, and numpy warns where rows that pass a block by meet them.
            engine.cache.k.view(torch.uint8).zero_()
            engine.cache.v.view(torch.uint8).zero_()
        self.runner = Runner(segment, self.cache, Most(rows=256, sequences=8), adapters=bank, graphs=graphs)
        self.device.executor = TritonExecutor(self.runner)
        self.dtype = dtype

    def pair(self, blocks: BlockRange | None = None, adapter: int = NO_ADAPTER) -> list[Any]:
        """A sequence in each engine."""
        return [engine.sequence(blocks or engine.blocks, 600, adapter) for engine in (self.oracle, self.device)]

    def pretend(self, lengths: Sequence[int]) -> list[list[Any]]:
        """Pairs of sequences whose slots hold random numbers instead of computed ones: long contexts for nothing."""
        for part in ("k", "v"):
            getattr(self.cache, part).copy_(getattr(self.oracle.cache, part).normal_())
        pairs = [self.pair() for _ in lengths]
        for pair, length in zip(pairs, lengths, strict=True):
            for sequence in pair:
                sequence.append(length)
        return pairs

    def run(self, both: Sequence[Sequence[SequenceRun]], states: Tensor) -> tuple[Tensor, Tensor]:
        """Run the same rows through both: what the oracle gives, and what the device gives."""
        plans = [engine.plan(runs) for engine, runs in zip((self.oracle, self.device), both, strict=True)]
        return self.oracle.run(plans[0], states), self.device.run(plans[1], states)

    def step(self, pairs: Sequence[Sequence[Any]], counts: Sequence[int]) -> None:
        """Append random rows to pairs of sequences, and compare."""
        both = [[pair[side].append(count) for pair, count in zip(pairs, counts, strict=True)] for side in range(2)]
        self.compare(both)

    def compare(self, both: Sequence[Sequence[SequenceRun]]) -> Tensor:
        """Run random rows through both and compare the outputs, which it gives."""
        states = torch.randn(sum(run.count for run in both[0]), HIDDEN).to(self.dtype)
        want, got = self.run(both, states)
        assert got.isfinite().all()
        if self.dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        else:
            # Both round at every step, at other places: what counts is the error as a whole.
            error = (got.float() - want.float()).norm() / want.float().norm()
            assert error < 4 * torch.finfo(self.dtype).eps
        return got


MakeRig = Callable[..., Rig]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny checkpoints, each written once."""
    written: dict[str, Path] = {}

    def folder(**geometry: Any) -> Path:
        model = TinyModel(**({"layers": 4, "hidden": HIDDEN} | geometry))
        if repr(model) not in written:
            written[repr(model)] = write_model(tmp_path_factory.mktemp("device") / "tiny", model)
        return written[repr(model)]

    return folder


@pytest.fixture
def use_references(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Put the kernels' plain-PyTorch references in the place of all but attention: thirty times faster here.

    They take the same arguments, and the kernels' own tests compare them.
    """

    def use() -> None:
        from kernels.frame_codec import reference as codec
        from kernels.grouped_lora import reference as lora
        from kernels.rms_norm import reference as norm
        from kernels.rotary_write import reference as rotary
        from kernels.silu_mul import reference as silu
        from serving.device import adapters, blocks, graphs, passes, runner

        monkeypatch.setattr(blocks, "add_rms_norm", norm.add_rms_norm)
        monkeypatch.setattr(blocks, "rotary_write", rotary.rotary_write)
        monkeypatch.setattr(blocks, "silu_mul", silu.silu_mul)
        monkeypatch.setattr(adapters, "grouped_lora", lora.grouped_lora)
        # The references need no promise of alignment.
        for module in (graphs, runner):
            monkeypatch.setattr(module, "decode_rows", lambda *parts, aligned: codec.decode_rows(*parts))
        monkeypatch.setattr(passes, "encode_rows", lambda *parts, aligned: codec.encode_rows(*parts))

    return use


@pytest.fixture
def make_rig(models: Callable[..., Path], use_references: Callable[[], None]) -> MakeRig:
    def make(
        *,
        kernels: bool = False,
        dtype: torch.dtype = torch.float32,
        graphs: bool = True,
        blocks: BlockRange = HOSTED,
        num_pages: int = 64,
        engine: dict[str, Any] | None = None,
        adapters: Sequence[LoraConfig] = (),
        **geometry: Any,
    ) -> Rig:
        torch.manual_seed(1)
        if not kernels:
            use_references()
        return Rig(models(**geometry), blocks, dtype, graphs, num_pages, adapters, **(engine or {}))

    return make
