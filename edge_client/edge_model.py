"""The edge's share of the model: embedding, segments A and C, head; and one pass over many sessions' work.

Everything here belongs to one thread, the worker's (`edge_client.worker`): sequences, engines, noise, sampling.
Shapes: N rows of the pass, d hidden.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edge_client.draft import NO_GUESSES, Decision, Draft
from edge_client.plugins import make_plugin
from edge_client.speculation.drafter import Drafter, DraftRequest, Guesses
from edge_client.step_log import EncodedRows
from edge_client.work import Encoded, Fed, LocalSession, PhaseTimes, Work, WorkResult
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.engine.engine import PAGE_SIZE, Engine
from split_llama.engine.kv_cache import Order
from split_llama.engine.low_rank import NO_ADAPTER, AdapterBank
from split_llama.engine.plan import SequenceRun
from split_llama.engine.sequence import Sequence as Positions
from split_llama.errors import FlLlamaError, ServerFault
from split_llama.load import load_embedding, load_packed_head, load_packed_segment
from split_llama.lora import Adapter
from split_llama.noise import (
    Accountant,
    NoiseChain,
    NoiseSpec,
    PrefixNoise,
    RowNoise,
    apply,
    apply_plugin,
    count_exact_rows,
)
from split_llama.products import Numerics
from split_llama.wire.codec import Codec, decode_rows, encode_rows

CALIBRATION_TOKENS = 64

log = logging.getLogger("fl_llama.edge")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in what the edge computes, and how many KV positions it keeps over all its sessions."""

    numerics: Numerics
    kv_positions: int
    sessions: int = 1


class _Stopwatch:
    """Gives the seconds since it was asked last."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class EdgeModel:
    """Embedding, A, C and head of one partition of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        partition: Partition,
        codec: Codec,
        placement: Placement,
        adapter: Adapter | None = None,
    ) -> None:
        """Load the weights. `adapter` is what A and C have of one, and goes for every session."""
        config = checkpoint.config
        count = config.num_hidden_layers
        self.config, self.partition, self.codec = config, partition, codec
        self.width = config.hidden_size
        numerics = placement.numerics
        self._dtype, self._device = numerics.compute, numerics.device
        self._spec = NoiseSpec(0.0)
        self._noise: PrefixNoise | None = None
        self._own_noise: RowNoise | None = None
        self.accountant = Accountant()
        self.drafter: Drafter | None = None
        self.times = PhaseTimes()
        self.embedding = load_embedding(checkpoint, dtype=numerics.compute, device=numerics.device)
        self.head = load_packed_head(checkpoint, numerics)
        self._a = _engine(checkpoint, partition.segment_a(count), placement, adapter)
        self._c = _engine(checkpoint, partition.segment_c(count), placement, adapter)
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
        a, c = (None if engine is None else _sequence(engine, max_length) for engine in (self._a, self._c))
        return LocalSession(a, c, NoiseChain(self._noise) if self._noise is not None else None)

    def use_noise(self, spec: NoiseSpec, noise: PrefixNoise) -> None:
        """Add this noise to every row of sessions opened from now on, but for a public first row.

        Raises `UsageError` for a plug-in that cannot be made.
        """
        self._own_noise = make_plugin("noise", spec.plugin, "rows") if spec.plugin else None
        self._spec, self._noise = spec, noise if spec.is_on else None

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[WorkResult]:
        """Do one pass; each session may appear once on either side. A fault of one work is that work's result."""
        results: list[WorkResult] = [Fed()] * len(works)
        decisions = self._run_replies(works, results)
        drafts, drafting = self._draft(decisions)
        feeding: list[_Feed] = []
        for index, work in enumerate(works):
            if isinstance(results[index], Exception):
                continue
            decision = decisions.get(index, Decision())
            if work.session.draft is not None and work.replies:
                work.session.settle(decision.path)
            draft = drafts.get(index)
            results[index] = Fed(decision.path, draft, drafting=drafting if decision.request is not None else 0.0)
            tokens = draft.tokens if draft is not None else work.tokens
            if tokens:
                feeding.append(_Feed(index, work.session, tokens, draft))
        self._run_tokens(feeding, results)
        return results

    def _run_replies(self, works: Sequence[Work], results: list[WorkResult]) -> dict[int, Decision]:
        """C and head over all replies; give what was decided, by work."""
        watch = _Stopwatch()
        indices: list[int] = []
        blocks: list[Tensor] = []
        runs = []
        for index, work in enumerate(works):
            if not work.replies:
                continue
            try:
                rows = self._decode(work.replies)
                if work.session.c is not None:
                    draft = work.session.draft
                    sequence = work.session.c
                    runs.append(sequence.append(len(rows)) if draft is None else sequence.append_draft(draft.tree))
            except FlLlamaError as error:
                results[index] = error
                continue
            indices.append(index)
            blocks.append(rows)
        if not indices:
            return {}
        states = torch.cat(blocks).to(self._device, self._dtype)
        self.times.codec += watch.lap()
        if self._c is not None:
            states = self._c.run(self._c.plan(runs), states)
        self.times.c += watch.lap()
        ends = np.cumsum([len(rows) for rows in blocks])
        asked = [(index, _rows_asked(works[index], int(end))) for index, end in zip(indices, ends, strict=True)]
        return self._decide(works, [(index, rows) for index, rows in asked if rows], states, results)

    def _decide(
        self, works: Sequence[Work], asked: Sequence[tuple[int, range]], states: Tensor, results: list[WorkResult]
    ) -> dict[int, Decision]:
        """Final norm and head over the rows asked for, then each work's decision on its own ones."""
        if not asked:
            return {}
        watch = _Stopwatch()
        final = self.head.norm(states[[row for _, rows in asked for row in rows]])
        logits = self.head.lm_head(final).float().cpu()
        final = final.float().cpu()
        self.times.head += watch.lap()
        decisions: dict[int, Decision] = {}
        # A sum is finite only if all of its terms are, and is read off faster than they are.
        finite = torch.isfinite(logits.sum(dim=-1)).tolist()
        start = 0
        for index, rows in asked:
            end = start + len(rows)
            decide = works[index].decide
            assert decide is not None
            try:
                if not all(finite[start:end]):
                    raise ServerFault("the logits are not finite: the server's answer or the weights are broken")
                decisions[index] = decide(logits[start:end], final[start:end])
            except Exception as error:
                # Samplers, grammars and a user's own code run in there; the others of this pass go on.
                results[index] = error
            start = end
        self.times.choose += watch.lap()
        return decisions

    def _draft(self, decisions: dict[int, Decision]) -> tuple[dict[int, Draft], float]:
        """Give what each work feeds next, and the time that guessing took."""
        requests = {index: decision.request for index, decision in decisions.items() if decision.request is not None}
        watch = _Stopwatch()
        guesses = dict(zip(requests, self._propose(list(requests.values())), strict=True))
        seconds = watch.lap()
        self.times.draft += seconds
        drafts = {
            index: Draft(decision.token, guesses.get(index, NO_GUESSES))
            for index, decision in decisions.items()
            if decision.token is not None
        }
        return drafts, seconds

    def _propose(self, requests: list[DraftRequest]) -> list[Guesses]:
        """Ask the drafter; one that fails is asked no more, as answers do not depend on it."""
        nothing = [NO_GUESSES] * len(requests)
        if not requests or self.drafter is None:
            return nothing
        try:
            proposed = zip(requests, self.drafter.propose(requests), strict=True)
            return [guesses.within(request.max_guesses, self.config.vocab_size) for request, guesses in proposed]
        except Exception:
            log.exception("the drafter failed; it goes on without guesses")
            self.drafter = None
            return nothing

    def _run_tokens(self, feeding: Sequence[_Feed], results: list[WorkResult]) -> None:
        """Embedding, A, noise and codec over all new tokens."""
        watch = _Stopwatch()
        accepted, runs = [], []
        for feed in feeding:
            try:
                if feed.session.a is not None:
                    runs.append(feed.grow(feed.session.a))
            except FlLlamaError as error:
                results[feed.index] = error
                continue
            accepted.append(feed)
        if not accepted:
            return
        ids = torch.tensor([token for feed in accepted for token in feed.tokens], device=self._device)
        states = self.embedding(ids)
        if self._a is not None:
            states = self._a.run(self._a.plan(runs), states)
        states = states.float().cpu()
        self.times.a += watch.lap()
        start = 0
        for feed in accepted:
            try:
                rows = self._encode(feed, states[start : start + len(feed.tokens)])
                fed = results[feed.index]
                assert isinstance(fed, Fed)
                results[feed.index] = replace(fed, rows=rows)
            except FlLlamaError as error:
                results[feed.index] = error
            start += len(feed.tokens)
        self.times.codec += watch.lap()

    def _encode(self, feed: _Feed, states: Tensor) -> tuple[Encoded, ...]:
        session, tokens, first = feed.session, feed.tokens, feed.session.length
        if feed.is_tentative:
            session.draft = feed.draft
        else:
            session.length += len(tokens)
        # Every session that begins with BOS sends this row: it is public, and hurt most by noise and coarse codecs.
        public = count_exact_rows(tokens, first, self.bos_token_id)
        if session.noise is not None:
            digests = feed.extend_noise(session.noise)
            self.accountant.charge(digests[public:])
            if self._own_noise is not None:
                states = apply_plugin(self._own_noise, self._spec.plugin, states, digests, public)
            else:
                states = apply(self._spec, states, session.noise.unit_rows(digests), public)
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
            states = self.bare_states([*begin, token])
            norms.append(states[len(begin) :].norm(dim=-1))
        return torch.cat(norms).numpy()

    def bare_states(self, tokens: Sequence[int]) -> Tensor:
        """Run tokens through embedding and A in a pass of their own; give A's output `[n, d]`, without noise."""
        states: Tensor = self.embedding(torch.tensor(tokens, device=self._device))
        if self._a is not None:
            sequence = _sequence(self._a, len(tokens))
            states = self._a.run(self._a.plan([sequence.append(len(tokens))]), states)
            sequence.free()
        return states.float().cpu()


@dataclass(frozen=True, slots=True)
class _Feed:
    """Tokens on their way through A: a prompt's, or a draft, which is tentative if it holds guesses."""

    index: int
    session: LocalSession
    tokens: tuple[int, ...]
    draft: Draft | None

    @property
    def is_tentative(self) -> bool:
        return self.draft is not None and not self.draft.is_plain

    def grow(self, sequence: Positions) -> SequenceRun:
        return (
            sequence.append_draft(self.draft.tree)
            if self.draft and self.is_tentative
            else sequence.append(len(self.tokens))
        )

    def extend_noise(self, noise: NoiseChain) -> list[bytes]:
        """Give the digests of the new rows; a draft's stay off the chain until it is settled."""
        if self.draft is not None and self.is_tentative:
            return noise.branch(self.tokens, self.draft.tree)
        first = len(noise)
        noise.append(self.tokens)
        return noise.digests(first)


def _rows_asked(work: Work, end: int) -> range:
    """The rows of a pass that `work` wants to look at, its own ones ending before `end`."""
    if work.decide is None:
        return range(0)
    draft = work.session.draft
    return range(end - (work.rows if draft is None else len(draft.tokens)), end)


def _sequence(engine: Engine, max_length: int) -> Positions:
    """Start a sequence over all of an engine's blocks, with its adapter if it has one."""
    return engine.sequence(engine.blocks, max_length, NO_ADAPTER if engine.adapters is None else 0)


def _engine(checkpoint: Checkpoint, blocks: BlockRange, placement: Placement, adapter: Adapter | None) -> Engine | None:
    """Make the engine of a segment; none for an empty one."""
    if not len(blocks):
        return None
    segment = load_packed_segment(checkpoint, blocks, placement.numerics)
    # Each session may leave a page half full.
    pages = -(-placement.kv_positions // PAGE_SIZE) + placement.sessions
    has_adapter = adapter is not None and adapter.part(blocks).tensors
    bank = AdapterBank(segment, [adapter]) if adapter is not None and has_adapter else None
    return Engine(segment, num_pages=pages, kv_order=Order.HEADS, adapters=bank)
