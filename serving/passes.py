"""What runs in the worker thread: payloads to a batch, the batch through the engine, outputs to replies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded batch: `states [rows, width]`, the rows of each step, and what is wrong with it, if anything."""

    states: Floats
    rows: tuple[slice, ...]
    errors: tuple[FlLlamaError | None, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished pass: the reply of each step or why there is none, and the seconds that the model took."""

    replies: tuple[Frame | ServerFault, ...]
    model_seconds: float


def decode_batch(steps: Sequence[Step], width: int) -> Decoded:
    """Decode the steps' rows back to back; a step with NaN or infinity fails alone, before anything is written."""
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
    return Decoded(states, tuple(rows), tuple(errors))


def run_pass(engine: Engine, plan: BatchPlan, decoded: Decoded, kept: Sequence[int], steps: Sequence[Step]) -> Outcome:
    """Run the plan over the rows of the `kept` steps (indices into `steps`, in the plan's order) and encode replies."""
    states = decoded.states
    if len(kept) < len(steps):
        states = np.concatenate([states[decoded.rows[index]] for index in kept])
    segment = engine.segment
    started = time.perf_counter()
    batch = torch.from_numpy(states).to(device=segment.device, dtype=segment.dtype)
    outputs = engine.run(plan, batch).to(device="cpu", dtype=torch.float32).numpy()
    model_seconds = time.perf_counter() - started
    replies: list[Frame | ServerFault] = []
    start = 0
    for index in kept:
        step = steps[index]
        replies.append(_reply(step, outputs[start : start + step.count]))
        start += step.count
    return Outcome(tuple(replies), model_seconds)


def _reply(step: Step, rows: Floats) -> Frame | ServerFault:
    if step.flags & Flag.REPLY_NONE:
        return step.reply(b"")
    try:
        return step.reply(encode_rows(step.codec, rows[-1:] if step.flags & Flag.REPLY_LAST else rows))
    except NonFiniteStates:
        return ServerFault(
            f"the model gave NaN or infinity from position {step.first} on; the server may need a wider --dtype"
        )
