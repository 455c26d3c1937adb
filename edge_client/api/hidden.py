"""What passes over the line for a prompt: what leaves segment A, what is sent, what comes back, what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_client.api.batch import Batch
from edge_client.draft import Decision
from edge_client.generate import PREFILL_ROWS, EdgeSession
from edge_client.runtime import EdgeRuntime
from edge_client.step_log import EncodedRows
from edge_client.work import Work
from split_llama.wire.codec import decode_rows


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """All float32 on the CPU, `[batch, n, d]`; zeros where `attention_mask [batch, n]` is 0.

    `before_noise`: segment A's output, which never leaves. `sent`: the rows as the server decodes them, clipped, noised
    and rounded by the codec. `received`: the server's answer, decoded. `final`: the final norm's output.
    `logits`: `[batch, n, vocab]`.
    """

    attention_mask: Tensor
    before_noise: Tensor
    sent: Tensor
    received: Tensor
    final: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class _Trace:
    """The same for one row, `[n, d]`."""

    before_noise: Tensor
    sent: Tensor
    received: Tensor
    final: Tensor
    logits: Tensor


def join(batch: Batch, traces: Sequence[_Trace]) -> HiddenStates:
    """Make one of all rows."""
    names = ("before_noise", "sent", "received", "final", "logits")
    stacked = {name: batch.stack([getattr(trace, name) for trace in traces]) for name in names}
    return HiddenStates(batch.mask(), **stacked)


async def trace(edge: EdgeRuntime, ids: Sequence[int]) -> _Trace:
    """Run `ids` through a session of its own and write down everything. Raises `FlLlamaError`."""
    model = edge.model

    def bare() -> Tensor:
        with torch.inference_mode():
            return model.bare_states(ids).clone()

    # A for itself first: its pages are free again before the session needs as many.
    before_noise = await edge.worker.ask(bare)
    sent: list[Tensor] = []
    async with edge.open() as session:
        for start in range(0, len(ids), PREFILL_ROWS):
            work = Work(session.local, tokens=tuple(ids[start : start + PREFILL_ROWS]))
            fed = await edge.worker.do(work)
            for part in fed.rows:
                session.remote.submit(part.first, part.rows)
                sent.append(_decoded(part.rows, model.width))
        received, logits, final = await _answers(edge, session, len(ids))
    return _Trace(before_noise, torch.cat(sent), received, final, logits)


async def _answers(edge: EdgeRuntime, session: EdgeSession, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take all answers up to position `stop` through C; give what came, the logits and the final states."""
    received: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def look(logits: Tensor, states: Tensor) -> Decision:
        seen.append((logits.clone(), states.clone()))
        return Decision()

    end = 0
    while end < stop:
        for answer in await session.remote.take():
            assert answer.rows is not None, "all rows were asked for"
            received.append(_decoded(answer.rows, edge.model.width))
            await edge.worker.do(Work(session.local, (answer.rows,), look, rows=answer.rows.count))
            end = answer.end
    logits, states = zip(*seen, strict=True)
    return torch.cat(received), torch.cat(logits), torch.cat(states)


def _decoded(rows: EncodedRows, width: int) -> Tensor:
    values = np.empty((rows.count, width), np.float32)
    decode_rows(rows.codec, rows.data, values)
    return torch.from_numpy(values)
