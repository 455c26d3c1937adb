"""Payloads of steps in pinned memory, checked there, and replies on their way back. One copy each way.

Rows keep their encoding; the device decodes and encodes them. Each row begins at a multiple of 16 bytes. Steps of one
codec lie together, so that one numpy expression checks all of them for NaN and infinity before any page changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from serving.device.memory import HostArena, aligned
from serving.steps import Step
from split_llama.errors import FlLlamaError, NonFiniteStates
from split_llama.wire.codec import Codec, finite_rows, row_bytes

ROW_ALIGNMENT = 16
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[Any]


def row_stride(codec: Codec, width: int) -> int:
    """Bytes from one staged row to the next."""
    return aligned(row_bytes(codec, width), ROW_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class StagedSteps:
    """Steps in `payload` (pinned, uint8), each from byte `offsets[i]` on, and what is wrong with each, if anything."""

    steps: tuple[Step, ...]
    errors: tuple[FlLlamaError | None, ...]
    offsets: tuple[int, ...]
    payload: Tensor


def stage_payloads(steps: Sequence[Step], width: int, arena: HostArena) -> StagedSteps:
    """Copy the steps' rows, of `width` values, into pinned memory and check them."""
    payload = arena.take(sum(step.count * row_stride(step.codec, width) for step in steps))
    raw: Bytes = payload.numpy()
    offsets = [0] * len(steps)
    errors: list[FlLlamaError | None] = [None] * len(steps)
    start = 0
    for codec in Codec:
        members = [index for index, step in enumerate(steps) if step.codec is codec]
        if not members:
            continue
        size, stride = row_bytes(codec, width), row_stride(codec, width)
        total = sum(steps[index].count for index in members)
        rows = raw[start : start + total * stride].reshape(total, stride)[:, :size]
        first = 0
        for index in members:
            step = steps[index]
            rows[first : first + step.count] = np.frombuffer(step.rows, np.uint8).reshape(step.count, size)
            offsets[index] = start + first * stride
            first += step.count
        _note_errors(~finite_rows(codec, rows, width), members, steps, errors)
        start += total * stride
    return StagedSteps(tuple(steps), tuple(errors), tuple(offsets), payload)


def _note_errors(
    bad_rows: Flags, members: Sequence[int], steps: Sequence[Step], errors: list[FlLlamaError | None]
) -> None:
    if not bad_rows.any():
        return
    first = 0
    for index in members:
        count = steps[index].count
        bad = np.flatnonzero(bad_rows[first : first + count])
        if len(bad):
            errors[index] = NonFiniteStates(f"NaN or infinity in row {bad[0]} of {count} ({len(bad)} rows have some)")
        first += count


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where the rows of a batch come from.

    `offsets` int64 `[N]` into `payload` (host, uint8) and `codecs` int32 `[N]`.
    """

    offsets: Integers
    codecs: Integers
    payload: Tensor


def row_source(staged: StagedSteps, kept: Sequence[int], width: int) -> RowSource:
    """Give the source of the kept steps' rows, back to back."""
    counts = [staged.steps[index].count for index in kept]
    codecs = [staged.steps[index].codec for index in kept]
    starts = np.array([staged.offsets[index] for index in kept], np.int64)
    strides = np.array([row_stride(codec, width) for codec in codecs], np.int64)
    row_in_step = _counting(counts)
    return RowSource(
        offsets=np.repeat(starts, counts) + row_in_step * np.repeat(strides, counts),
        codecs=np.repeat(np.array(codecs, np.int32), counts),
        payload=staged.payload,
    )


@dataclass(frozen=True, slots=True)
class ReplyLayout:
    """Where replies are encoded: rows of the batch, their byte offsets and codecs, and for each step its share.

    `first_rows[i]` is the first reply row of step i, `starts[i]` its first byte; `size` the bytes of all replies.
    """

    rows: Integers
    offsets: Integers
    codecs: Integers
    first_rows: tuple[int, ...]
    starts: tuple[int, ...]
    size: int


def reply_layout(steps: Sequence[Step], width: int) -> ReplyLayout:
    """Lay the replies of steps out whose rows lie back to back in the batch."""
    counts = [step.num_replies for step in steps]
    strides = [row_stride(step.codec, width) for step in steps]
    # A reply of fewer rows than the step is its last row.
    ends = np.cumsum([step.count for step in steps])
    starts = np.cumsum([0, *(count * stride for count, stride in zip(counts, strides, strict=True))])
    first_rows = np.cumsum([0, *counts])
    row_in_reply = _counting(counts)
    return ReplyLayout(
        rows=(np.repeat(ends - counts, counts) + row_in_reply).astype(np.int32),
        offsets=np.repeat(starts[:-1], counts) + row_in_reply * np.repeat(np.array(strides, np.int64), counts),
        codecs=np.repeat(np.array([step.codec for step in steps], np.int32), counts),
        first_rows=tuple(first_rows[:-1].tolist()),
        starts=tuple(starts[:-1].tolist()),
        size=int(starts[-1]),
    )


def reply_bytes(step: Step, payload: Bytes, start: int, width: int) -> bytes:
    """Cut a step's reply out of the encoded replies."""
    size, stride = row_bytes(step.codec, width), row_stride(step.codec, width)
    rows = payload[start : start + step.num_replies * stride].reshape(step.num_replies, stride)
    return rows[:, :size].tobytes()


def _counting(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Count 0, 1, ... anew in each group of `counts` rows."""
    total = sum(counts)
    starts = np.cumsum([0, *counts[:-1]]) if counts else np.zeros(0, np.int64)
    return np.arange(total, dtype=np.int64) - np.repeat(starts, counts)
