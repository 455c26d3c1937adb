"""The edge's share of the model: embedding, segments A and C, head; and one pass over many sessions' work.

Everything here belongs to one thread, the worker's (`edge_client.worker`): sequences, engines, noise, sampling.
Shapes: N rows of the pass, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_client.step_log import EncodedRows
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.engine.engine import PAGE_SIZE, Engine
from split_llama.engine.kv_cache import Order
from split_llama.engine.sequence import Sequence as Positions
from split_llama.errors import FlLlamaError, ServerFault
from split_llama.load import load_embedding, load_packed_head, load_packed_segment
from split_llama.noise import Accountant, NoiseChain, NoiseSpec, PrefixNoise, apply, count_exact_rows
from split_llama.products import Numerics
from split_llama.wire.codec import Codec, decode_rows, encode_rows

CALIBRATION_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in what the edge computes, and how many KV positions it keeps over all its sessions."""

    numerics: Numerics
    kv_positions: int
    sessions: int = 1


@dataclass(slots=True)
class LocalSession:
    """One session at the edge: the KV of A and C, how many tokens it has, the noise of their prefix."""

    a: Positions | None
    c: Positions | None
    noise: NoiseChain | None
    length: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """One session's share of a pass: run `replies` through C, let `choose` pick tokens from the last row's logits, then
    run those tokens (or `tokens`) through A. `choose` runs in the worker's thread and may give no token."""

    session: LocalSession
    replies: tuple[EncodedRows, ...] = ()
    choose: Callable[[Tensor], Sequence[int]] | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready to be sent, from position `first` on."""

    first: int
    rows: EncodedRows

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.first + self.rows.count


WorkResult = tuple[Encoded, ...] | Exception


class EdgeModel:
    """Embedding, A, C and head of one partition of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, partition: Partition, codec: Codec, placement: Placement) -> None:
        config = checkpoint.config
        count = config.num_hidden_layers
        self.config, self.partition, self.codec = config, partition, codec
        self.width = config.hidden_size
        numerics = placement.numerics
        self._dtype, self._device = numerics.compute, numerics.device
        self._spec = NoiseSpec(0.0)
        self._noise: PrefixNoise | None = None
        self.accountant = Accountant()
        self.embedding = load_embedding(checkpoint, dtype=numerics.compute, device=numerics.device)
        self.head = load_packed_head(checkpoint, numerics)
        self._a = _engine(checkpoint, partition.segment_a(count), placement)
        self._c = _engine(checkpoint, partition.segment_c(count), placement)
        defaults = checkpoint.generation_config()
        self.defaults = defaults
        self.bos_token_id = defaults.bos_token_id

    @property
    def product_bytes(self) -> int:
        """Bytes of weights that a token costs here: those of A, C and the head."""
        engines = [engine for engine in (self._a, self._c) if engine is not None]
        return self.head.lm_head.product_bytes + sum(engine.segment.product_bytes for engine in engines)

    def open(self, max_length: int) -> LocalSession:
        """Start a session of at most `max_length` positions."""
        a = self._a.sequence(self._a.blocks, max_length) if self._a is not None else None
        c = self._c.sequence(self._c.blocks, max_length) if self._c is not None else None
        return LocalSession(a, c, NoiseChain(self._noise) if self._noise is not None else None)

    def use_noise(self, spec: NoiseSpec, noise: PrefixNoise) -> None:
        """Add this noise to every row of sessions opened from now on, but for a public first row."""
        self._spec, self._noise = spec, noise if spec.is_on else None

    def free(self, session: LocalSession) -> None:
        """Give a session's pages back."""
        for sequence in (session.a, session.c):
            if sequence is not None:
                sequence.free()

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[WorkResult]:
        """Do one pass; each session may appear once on either side. A fault of one work is that work's result."""
        results: list[WorkResult] = [()] * len(works)
        chosen = self._run_replies(works, results)
        feeding = [
            (index, tokens)
            for index, work in enumerate(works)
            if (tokens := tuple(chosen.get(index, work.tokens))) and not isinstance(results[index], Exception)
        ]
        self._run_tokens(works, feeding, results)
        return results

    def _run_replies(self, works: Sequence[Work], results: list[WorkResult]) -> dict[int, Sequence[int]]:
        """C and head over all replies; give the tokens that were chosen, by work."""
        indices: list[int] = []
        blocks: list[Tensor] = []
        runs = []
        for index, work in enumerate(works):
            if not work.replies:
                continue
            try:
                rows = self._decode(work.replies)
                if work.session.c is not None:
                    runs.append(work.session.c.append(len(rows)))
            except FlLlamaError as error:
                results[index] = error
                continue
            indices.append(index)
            blocks.append(rows)
        if not indices:
            return {}
        states = torch.cat(blocks).to(self._device, self._dtype)
        if self._c is not None:
            states = self._c.run(self._c.plan(runs), states)
        ends = np.cumsum([len(rows) for rows in blocks])
        choosing = [(index, int(end) - 1) for index, end in zip(indices, ends, strict=True) if works[index].choose]
        if not choosing:
            return {}
        logits = self.head(states[[row for _, row in choosing]])
        return self._choose(works, [index for index, _ in choosing], logits, results)

    def _choose(
        self, works: Sequence[Work], indices: Sequence[int], logits: Tensor, results: list[WorkResult]
    ) -> dict[int, Sequence[int]]:
        chosen: dict[int, Sequence[int]] = {}
        # A sum is finite only if all of its terms are, and is read off faster than they are.
        finite = torch.isfinite(logits.sum(dim=-1)).tolist()
        for index, row, is_finite in zip(indices, logits, finite, strict=True):
            choose = works[index].choose
            assert choose is not None
            try:
                if not is_finite:
                    raise ServerFault("the logits are not finite: the server's answer or the weights are broken")
                chosen[index] = choose(row)
            except FlLlamaError as error:
                results[index] = error
        return chosen

    def _run_tokens(
        self, works: Sequence[Work], feeding: Sequence[tuple[int, tuple[int, ...]]], results: list[WorkResult]
    ) -> None:
        """Embedding, A, noise and codec over all new tokens."""
        accepted, runs = [], []
        for index, tokens in feeding:
            sequence = works[index].session.a
            try:
                if sequence is not None:
                    runs.append(sequence.append(len(tokens)))
            except FlLlamaError as error:
                results[index] = error
                continue
            accepted.append((index, tokens))
        if not accepted:
            return
        ids = torch.tensor([token for _, tokens in accepted for token in tokens], device=self._device)
        states = self.embedding(ids)
        if self._a is not None:
            states = self._a.run(self._a.plan(runs), states)
        states = states.float().cpu()
        start = 0
        for index, tokens in accepted:
            try:
                results[index] = self._encode(works[index].session, tokens, states[start : start + len(tokens)])
            except FlLlamaError as error:
                results[index] = error
            start += len(tokens)

    def _encode(self, session: LocalSession, tokens: tuple[int, ...], states: Tensor) -> tuple[Encoded, ...]:
        first = session.length
        session.length += len(tokens)
        # Every session that begins with BOS sends this row: it is public, and hurt most by noise and coarse codecs.
        public = count_exact_rows(tokens, first, self.bos_token_id)
        if session.noise is not None:
            session.noise.append(tokens)
            self.accountant.charge(session.noise.digests(first + public))
            states = apply(self._spec, states, session.noise.rows(first), public)
        rows = states.numpy()
        if public and self.codec is not Codec.FP32:
            exact = Encoded(0, EncodedRows(Codec.FP32, 1, encode_rows(Codec.FP32, rows[:1])))
            rest = self._encoded(1, rows[1:])
            return (exact, *rest)
        return self._encoded(first, rows)

    def _encoded(self, first: int, rows: np.ndarray) -> tuple[Encoded, ...]:
        if not len(rows):
            return ()
        return (Encoded(first, EncodedRows(self.codec, len(rows), encode_rows(self.codec, rows))),)

    def _decode(self, replies: Sequence[EncodedRows]) -> Tensor:
        rows = np.empty((sum(reply.count for reply in replies), self.width), np.float32)
        at = 0
        for reply in replies:
            decode_rows(reply.codec, reply.data, rows[at : at + reply.count])
            at += reply.count
        return torch.from_numpy(rows)

    @torch.inference_mode()
    def output_norms(self) -> np.ndarray:
        """Norms of A's output over a fixed, public set of tokens spread over the vocabulary, each after BOS if any."""
        # Special tokens, whose norms are others, sit at the ends of a vocabulary: stay clear of both.
        tokens = [(2 * i + 1) * self.config.vocab_size // (2 * CALIBRATION_TOKENS) for i in range(CALIBRATION_TOKENS)]
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        norms = []
        for token in tokens:
            states = self._bare_states([*begin, token])
            norms.append(states[len(begin) :].norm(dim=-1))
        return torch.cat(norms).numpy()

    def _bare_states(self, tokens: Sequence[int]) -> Tensor:
        states: Tensor = self.embedding(torch.tensor(tokens, device=self._device))
        if self._a is not None:
            sequence = self._a.sequence(self._a.blocks, len(tokens))
            states = self._a.run(self._a.plan([sequence.append(len(tokens))]), states)
            sequence.free()
        return states.float().cpu()


def _engine(checkpoint: Checkpoint, blocks: BlockRange, placement: Placement) -> Engine | None:
    """Make the engine of a segment; none for an empty one."""
    if not len(blocks):
        return None
    segment = load_packed_segment(checkpoint, blocks, placement.numerics)
    # Each session may leave a page half full.
    pages = -(-placement.kv_positions // PAGE_SIZE) + placement.sessions
    return Engine(segment, num_pages=pages, kv_order=Order.HEADS)
