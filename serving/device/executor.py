"""The kernels behind the engine's own seams: for tests and benchmarks, and whoever has states at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.device.blocks import BlockInputs, attend
from serving.device.device import Device
from serving.device.inputs import Geometry, block_inputs, fields, fill, host_inputs
from serving.device.memory import HostArena, Packing
from serving.device.runner import Runner, pages_of
from split_llama.config import BlockRange
from split_llama.engine.kv_cache import KVCache
from split_llama.engine.plan import BatchPlan, SequenceRun
from split_llama.layers import BlockAttention, Segment


class TritonExecutor:
    """Runs plans over the kernels; see `split_llama.engine.engine.Executor`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._arena = HostArena(runner.device)

    @torch.inference_mode()
    def run(self, plan: BatchPlan, states: Tensor) -> Tensor:
        """Run one pass and wait for it."""
        assert states.shape == (plan.num_rows, self._runner.width), "plan and states disagree"
        device = self._runner.device
        with device.entered():
            self._arena.reset()
            outputs = self._runner.run(plan, states, self._arena).clone()
            device.mark().wait()
        return outputs


class TritonAttention:
    """Attention by the kernel inside plain PyTorch blocks; see `split_llama.engine.attention.Attention`."""

    def __init__(self, segment: Segment, device: Device) -> None:
        self._segment = segment
        self._device = device

    def plan(self, runs: Sequence[SequenceRun], cache: KVCache, windows: Sequence[int]) -> BlockAttention:
        """Plan the launches of a stage, whose blocks all runs pass through."""
        span = BlockRange(max(run.blocks.start for run in runs), min(run.blocks.stop for run in runs))
        pages = pages_of(cache)
        geometry = Geometry.of(self._segment, pages[0])
        inputs = host_inputs(runs, span, geometry)
        packing = Packing(fields(inputs.needs, span, geometry))
        host = torch.empty(packing.size, dtype=torch.uint8)
        fill(packing.arrays(host), inputs, None)
        tensors = packing.tensors(host.to(self._device.torch_device))
        return _PlannedAttention(self._segment, cache, block_inputs(tensors, inputs.needs, span, geometry))


@dataclass(frozen=True, slots=True)
class _PlannedAttention:
    segment: Segment
    cache: KVCache
    inputs: BlockInputs

    def __call__(self, block: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        self.cache.write(block, self.inputs.slots, k_NGK, v_NGK)
        q_NHK = q_NHK.contiguous()
        out_NHK = torch.empty_like(q_NHK)
        pages = pages_of(self.cache)[block - self.segment.blocks.start]
        attend(block, self.segment, q_NHK, pages, self.inputs, out_NHK)
        return out_NHK
