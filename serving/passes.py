"""The computing half of a pass: payloads into a batch, the batch through the blocks, outputs into replies.

The engine loop (`serving.worker`) stages steps, plans pages, starts the pass and finishes it. `stage` and `start` run
in one thread and `finish` may run in another, so that a device can compute while the host prepares the next pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from serving.steps import Step
from split_llama.engine.engine import Engine
from split_llama.engine.plan import BatchPlan
from split_llama.errors import FlLlamaError, NonFiniteStates, ServerFault
from split_llama.wire.codec import decode_rows, encode_rows
from split_llama.wire.frame import Flag, Frame

Floats = npt.NDArray[np.float32]


class Staged(Protocol):
    """Steps whose payloads were checked and laid out for a pass; `errors` says for each what is wrong, if anything."""

    @property
    def errors(self) -> Sequence[FlLlamaError | None]:
        """One entry per staged step."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished pass: the reply of each step or why there is none, and the seconds that the model took."""

    replies: tuple[Frame | ServerFault, ...]
    model_seconds: float


class Passes(Protocol):
    """Computes passes. Plans run in the order in which they were started; at most `depth` may be unfinished."""

    depth: int

    def stage(self, steps: Sequence[Step]) -> Staged:
        """Check and lay out payloads; a step with NaN or infinity fails alone, before anything is written."""
        ...

    def start(self, plan: BatchPlan, staged: Any, kept: Sequence[int]) -> Any:
        """Begin a pass over the `kept` steps (indices into the staged ones, in the plan's order)."""
        ...

    def finish(self, running: Any) -> Outcome:
        """Wait for a started pass and give its replies, in the order of `kept`."""
        ...


@dataclass(frozen=True, slots=True)
class HostBatch:
    """Steps decoded on the host: `states [rows, width]` float32, and the rows of each step."""

    steps: tuple[Step, ...]
    states: Floats
    rows: tuple[slice, ...]
    errors: tuple[FlLlamaError | None, ...]


@dataclass(frozen=True, slots=True)
class HostOutput:
    """Outputs `[rows, width]` float32 of the steps that took part."""

    steps: tuple[Step, ...]
    outputs: Floats
    model_seconds: float


class HostPasses:
    """Passes through an engine, one at a time, with payloads decoded and encoded on the host."""

    depth = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def stage(self, steps: Sequence[Step]) -> HostBatch:
        """Decode the steps' rows back to back; see `Passes.stage`."""
        width = self._engine.segment.config.hidden_size
        states = np.empty((sum(step.count for step in steps), width), np.float32)
        rows: list[slice] = []
        errors: list[FlLlamaError | None] = []
        start = 0
        for step in steps:
            rows.append(slice(start, start + step.count))
            start += step.count
            try:
                decode_rows(step.codec, step.rows, states[rows[-1]])
            except FlLlamaError as error:
                errors.append(error)
            else:
                errors.append(None)
        return HostBatch(tuple(steps), states, tuple(rows), tuple(errors))

    def start(self, plan: BatchPlan, staged: HostBatch, kept: Sequence[int]) -> HostOutput:
        """Run the plan; see `Passes.start`."""
        states = staged.states
        if len(kept) < len(staged.steps):
            states = np.concatenate([states[staged.rows[index]] for index in kept])
        segment = self._engine.segment
        started = time.perf_counter()
        batch = torch.from_numpy(states).to(device=segment.device, dtype=segment.dtype)
        outputs = self._engine.run(plan, batch).to(device="cpu", dtype=torch.float32).numpy()
        seconds = time.perf_counter() - started
        return HostOutput(tuple(staged.steps[index] for index in kept), outputs, seconds)

    def finish(self, running: HostOutput) -> Outcome:
        """Encode the replies; see `Passes.finish`."""
        replies: list[Frame | ServerFault] = []
        start = 0
        for step in running.steps:
            replies.append(_reply(step, running.outputs[start : start + step.count]))
            start += step.count
        return Outcome(tuple(replies), running.model_seconds)


def _reply(step: Step, rows: Floats) -> Frame | ServerFault:
    if step.flags & Flag.REPLY_NONE:
        return step.reply(b"")
    try:
        return step.reply(encode_rows(step.codec, rows[-1:] if step.flags & Flag.REPLY_LAST else rows))
    except NonFiniteStates:
        return not_finite(step)


def not_finite(step: Step) -> ServerFault:
    """Say that the blocks gave NaN or infinity for a step."""
    return ServerFault(
        f"the model gave NaN or infinity from position {step.first} on; the server may need a wider --dtype"
    )
