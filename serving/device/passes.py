"""Passes on the device: two at a time, so that the host works on the next one while the device computes this one.

stage    payloads into pinned memory, checked there
start    one copy of rows and one of integers to the device, the blocks, replies encoded, one copy back: all queued
finish   wait once, then cut the replies up
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.frame_codec.kernel import encode_rows
from serving.device.device import Mark
from serving.device.memory import HostArena, aligned, upload
from serving.device.runner import Runner
from serving.device.staging import ReplyLayout, StagedSteps, reply_bytes, reply_layout, row_source, stage_payloads
from serving.passes import Outcome, not_finite
from serving.steps import Step
from split_llama.engine.plan import BatchPlan
from split_llama.errors import ServerFault
from split_llama.wire.frame import Frame

FLAG_BYTES = 4


class _Lane:
    """The host memory of one pass. `serial` counts its uses; it is `busy` from the start of a pass to its finish."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.serial = 0
        self.busy = False


@dataclass(frozen=True, slots=True)
class DeviceStaged:
    """Staged steps and the lane that they lie in."""

    lane: _Lane
    staged: StagedSteps
    serial: int

    @property
    def errors(self) -> Sequence[Any]:
        """What is wrong with each step, if anything."""
        return self.staged.errors


@dataclass(frozen=True, slots=True)
class DeviceRunning:
    """A pass that was started: where its replies will lie once `ended` is reached."""

    lane: _Lane
    steps: tuple[Step, ...]
    layout: ReplyLayout
    replies: Tensor
    began: Mark
    ended: Mark


class DevicePasses:
    """Passes over the kernels; see `serving.passes.Passes`."""

    depth = 2

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        # Two passes may run while a third is staged.
        self._lanes = [_Lane(HostArena(runner.device)) for _ in range(self.depth + 1)]
        self._serial = 0

    def warm_up(self, seconds: float) -> None:
        """Make all ready, in about `seconds` and the time that kernels take to compile; see `Runner.warm_up`."""
        runner = self._runner
        runner.warm_up(seconds)
        nothing = np.zeros(1, np.int64)
        layout = ReplyLayout(nothing.astype(np.int32), nothing, np.full(1, -1, np.int32), (), (), size=aligned(1))
        with runner.device.entered(), torch.inference_mode():
            outputs = torch.zeros((1, runner.width), dtype=runner.segment.dtype, device=runner.device.torch_device)
            self._encode(outputs, layout, HostArena(runner.device))
            runner.device.mark().wait()

    def stage(self, steps: Sequence[Step]) -> DeviceStaged:
        """Check and lay out payloads; see `Passes.stage`. What was staged before and not started is given up."""
        lane = min((lane for lane in self._lanes if not lane.busy), key=lambda lane: lane.serial)
        self._serial += 1
        lane.serial = self._serial
        lane.arena.reset()
        return DeviceStaged(lane, stage_payloads(steps, self._runner.width, lane.arena), lane.serial)

    def start(self, plan: BatchPlan, staged: DeviceStaged, kept: Sequence[int]) -> DeviceRunning:
        """Queue a pass; see `Passes.start`."""
        lane, runner = staged.lane, self._runner
        assert lane.serial == staged.serial, "these steps were staged too long ago"
        assert not lane.busy, "these steps were started before"
        with runner.device.entered(), torch.inference_mode():
            began = runner.device.mark()
            rows = row_source(staged.staged, kept, runner.width)
            outputs = runner.run(plan, rows, lane.arena)
            steps = tuple(staged.staged.steps[index] for index in kept)
            layout = reply_layout(steps, runner.width)
            replies = self._encode(outputs, layout, lane.arena)
            ended = runner.device.mark()
        lane.busy = True
        return DeviceRunning(lane, steps, layout, replies, began, ended)

    def _encode(self, outputs: Tensor, layout: ReplyLayout, arena: HostArena) -> Tensor:
        """Queue the encoding of replies and their copy to the host: first a flag per row, then the rows."""
        device, width = self._runner.device, self._runner.width
        count = len(layout.rows)
        flags = aligned(count * FLAG_BYTES)
        host = arena.take(flags + layout.size)
        if count:
            places = {"rows": layout.rows, "offsets": layout.offsets, "codecs": layout.codecs}
            tensors = upload(places, arena, device)
            encoded = torch.empty(flags + layout.size, dtype=torch.uint8, device=device.torch_device)
            bad = encoded[:flags].zero_().view(torch.int32)[:count]
            encode_rows(
                outputs,
                tensors["rows"],
                tensors["offsets"],
                tensors["codecs"],
                encoded[flags:],
                bad,
                aligned=width % 2 == 0,
            )
            host.copy_(encoded, non_blocking=True)
        return host

    def finish(self, running: DeviceRunning) -> Outcome:
        """Wait for a pass, once, and give its replies; see `Passes.finish`."""
        try:
            running.ended.wait()
            replies = tuple(self._replies(running))
        finally:
            running.lane.busy = False
        return Outcome(replies, running.ended.seconds_since(running.began))

    def _replies(self, running: DeviceRunning) -> list[Frame | ServerFault]:
        layout = running.layout
        count = len(layout.rows)
        raw = running.replies.numpy()
        bad = raw[: count * FLAG_BYTES].view(np.int32)
        payload = raw[aligned(count * FLAG_BYTES) :]
        replies: list[Frame | ServerFault] = []
        for step, first, start in zip(running.steps, layout.first_rows, layout.starts, strict=True):
            if bad[first : first + step.num_replies].any():
                replies.append(not_finite(step))
            else:
                replies.append(step.reply(reply_bytes(step, payload, start, self._runner.width)))
        return replies
