"""One answer from prompt to last token: A here, B on the server, C here, with as much of it at once as possible."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from edge_client.decoding import Decoder, Pace
from edge_client.draft import Decision
from edge_client.session import RemoteSession
from edge_client.session_events import Answer
from edge_client.speculation.pace import Round
from edge_client.step_log import EncodedRows
from edge_client.turn import TokenEvent, Turn
from edge_client.work import Decide, Encoded, Fed, LocalSession, Work
from edge_client.worker import EdgeWorker
from split_llama.wire.codec import Codec
from split_llama.wire.frame import Flag

PREFILL_ROWS = 128

# Takes the position of the first of some prompt rows, their logits [n, vocab] and final norm outputs [n, d].
See = Callable[[int, Tensor, Tensor], None]


@dataclass(slots=True)
class GenerationStats:
    """Times are milliseconds since the prompt was handed in. Bytes are frames with their headers, of this session;
    what WebSocket, TLS and TCP add is not counted. A round trip is one wait for the server: one for the prompt, then
    one per draft, or per token without drafts. Tokens of one round trip come at once: the first has the wait in
    `itl_ms`, the others 0. `drafted` guesses were sent in `rows_up` rows, `accepted` of them were right. The rows of
    `cached_tokens` were not sent, because the session had them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    round_trips: int = 0
    ttft_ms: float = 0.0
    itl_ms: list[float] = field(default_factory=list)
    total_ms: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    rows_up: int = 0
    drafted: int = 0
    accepted: int = 0


class EdgeSession:
    """One sequence, here and on the server. Use `EdgeRuntime.open` or `Conversations` to get one.

    A session makes one answer; whoever wants to go on from it forks it. `tokens` are those it holds settled, here and
    there.
    """

    def __init__(
        self,
        local: LocalSession,
        remote: RemoteSession,
        worker: EdgeWorker,
        *,
        all_rows: bool,
        codec: Codec,
        max_length: int,
        pace: Pace | None = None,
        tokens: Sequence[int] = (),
        finished: Callable[[EdgeSession, Sequence[int]], None] | None = None,
    ) -> None:
        self.stats = GenerationStats(cached_tokens=len(tokens))
        self.tokens = list(tokens)
        self.pace = pace
        self._local = local
        self._remote = remote
        self._worker = worker
        self._max_length = max_length
        self._max_draft_rows = remote.max_draft_rows(codec)
        # Without blocks in C only the last position's output is of use.
        self._all_rows = all_rows
        self._finished = finished
        self._begin = 0.0
        self._carried_bytes = (0, 0)

    @property
    def remote(self) -> RemoteSession:
        """The session on the server."""
        return self._remote

    @property
    def local(self) -> LocalSession:
        """The session's state at the edge."""
        return self._local

    async def generate(self, prompt_ids: Sequence[int], turn: Turn) -> AsyncGenerator[TokenEvent, None]:
        """Feed what the session does not have of the prompt, then yield each token until `turn` is over.

        Raises `FlLlamaError`; after that, or when the caller leaves before the end, the session is of no more use.
        """
        decoder = Decoder(turn, prompt_ids, pace=self.pace, max_rows=self._max_draft_rows, max_length=self._max_length)
        self._begin = time.perf_counter()
        self.stats.prompt_tokens = len(prompt_ids)
        try:
            if turn.finish_reason is not None:
                return
            see = _see_prompt(turn) if turn.wants_prompt_logits else None
            fed = await self._prefill(prompt_ids, _first_decision(turn, decoder), see)
            self._note_tokens(len(turn.tokens), self._begin)
            while fed.draft is not None:
                sent = time.perf_counter()
                self._submit(fed)
                for event in turn.take_events():
                    yield event
                fed = await self._verify(fed, decoder, len(turn.tokens), turn, sent)
            if self._finished is not None:
                self._finished(self, [*prompt_ids, *turn.tokens])
            for event in turn.take_events():
                yield event
        finally:
            self._count_bytes()

    async def prefill(self, ids: Sequence[int], see: See | None = None) -> None:
        """Feed `ids` behind what the session has, without an answer; `see` looks at every row's logits and states."""
        self._begin = time.perf_counter()
        self.stats.prompt_tokens = len(ids)
        await self._prefill(ids, lambda _logits, _states: Decision(), see)
        self._count_bytes()

    async def _prefill(self, ids: Sequence[int], decide: Decide, see: See | None) -> Fed:
        """Run the prompt through all segments, chunk by chunk at once; give what `decide` made of its last row."""
        cached = len(self.tokens)
        assert list(ids[:cached]) == self.tokens, "the session holds other tokens"
        assert cached < len(ids), "there is nothing to feed"
        feeder = asyncio.create_task(self._feed(ids, see is not None), name="prefill")
        self.stats.round_trips += 1
        at = cached
        try:
            while True:
                for answers in _together(await self._answers(feeder), see is None):
                    fed = await self._take_chunk(answers, len(ids), decide, see, at)
                    at = answers[-1].end
                if at == len(ids):
                    self.tokens = list(ids)
                    return fed
        finally:
            feeder.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await feeder

    async def _feed(self, ids: Sequence[int], all_rows: bool) -> None:
        """Run the prompt through A and send it, chunk by chunk, while answers to earlier chunks are worked on."""
        for start in range(len(self.tokens), len(ids), PREFILL_ROWS):
            chunk = tuple(ids[start : start + PREFILL_ROWS])
            fed = await self._worker.do(Work(self._local, tokens=chunk))
            final = start + len(chunk) == len(ids)
            flags = 0 if self._all_rows or all_rows else Flag.REPLY_LAST if final else Flag.REPLY_NONE
            self._send(fed.rows, flags)

    async def _take_chunk(self, answers: Sequence[Answer], stop: int, decide: Decide, see: See | None, at: int) -> Fed:
        """Run the rows of some answers through C and look at them as far as anybody wants to."""
        final = answers[-1].end == stop
        rows = tuple(answer.rows for answer in answers if answer.rows is not None)
        if not rows or not (final or self._all_rows or see is not None):
            return Fed()
        if see is not None:
            return await self._worker.do(_scoring(self._local, rows, decide if final else None, see, at))
        return await self._worker.do(Work(self._local, rows, decide if final else None))

    async def _verify(self, fed: Fed, decoder: Decoder, chosen: int, turn: Turn, sent: float) -> Fed:
        """Wait for the answer to what was fed, and let it decide what comes next."""
        draft, last = fed.draft, self._begin + self.stats.total_ms / 1000
        assert draft is not None
        self.stats.round_trips += 1
        (answer,) = await self._remote.take()
        assert answer.rows is not None
        arrived = self._remote.answered_at
        begin = time.perf_counter()
        pending = None if draft.is_plain else draft
        work = Work(self._local, (answer.rows,), lambda logits, states: decoder.decide(pending, logits, states))
        verified = await self._worker.do(work)
        if pending is not None:
            self._remote.settle(verified.path)
            self.stats.drafted += len(draft.guesses)
            self.stats.accepted += len(verified.path) - 1
        self.tokens += [draft.tokens[node] for node in verified.path]
        self._note_tokens(len(turn.tokens) - chosen, last)
        if self.pace is not None:
            # How long the reader took for the tokens before is no concern of the pace.
            right = tuple(node - 1 for node in verified.path[1:])
            seconds = arrived - sent + time.perf_counter() - begin - verified.drafting
            self.pace.observe(Round(draft.guesses.chances, right, seconds, fed.drafting))
        return verified

    def _submit(self, fed: Fed) -> None:
        assert fed.draft is not None
        if fed.draft.is_plain:
            self._send(fed.rows, 0)
            return
        (part,) = fed.rows
        self._remote.submit_draft(part.first, part.rows, fed.draft.tree)
        self.stats.rows_up += part.rows.count

    def _send(self, rows: Sequence[Encoded], flags: int) -> None:
        for part in rows:
            self._remote.submit(part.first, part.rows, flags)
            self.stats.rows_up += part.rows.count

    async def _answers(self, feeder: asyncio.Task[None]) -> list[Answer]:
        """Wait for the server; a fault while the prompt is fed ends the wait."""
        take = asyncio.ensure_future(self._remote.take())
        try:
            if not feeder.done():
                await asyncio.wait((take, feeder), return_when=asyncio.FIRST_COMPLETED)
            if feeder.done() and (error := feeder.exception()) is not None:
                raise error
            return await take
        finally:
            take.cancel()

    def _note_tokens(self, count: int, last: float) -> None:
        """Write down the time of tokens that were just chosen, `last` being that of those before."""
        if not count:
            return
        now = time.perf_counter()
        if self.stats.ttft_ms == 0.0:
            self.stats.ttft_ms = (now - last) * 1000
            waits = [0.0] * (count - 1)
        else:
            waits = [(now - last) * 1000] + [0.0] * (count - 1)
        self.stats.itl_ms += waits
        self.stats.total_ms = (now - self._begin) * 1000
        self._count_bytes()

    def carry(self, trunk: GenerationStats) -> None:
        """Count what another session did for this one, which was forked from it for this answer."""
        stats = self.stats
        stats.cached_tokens = trunk.cached_tokens
        stats.round_trips += trunk.round_trips
        stats.rows_up += trunk.rows_up
        self._carried_bytes = (trunk.bytes_up, trunk.bytes_down)
        self._count_bytes()

    def _count_bytes(self) -> None:
        up, down = self._carried_bytes
        self.stats.bytes_up, self.stats.bytes_down = up + self._remote.bytes_up, down + self._remote.bytes_down


def _together(answers: Sequence[Answer], all_at_once: bool) -> list[Sequence[Answer]]:
    """Answers that came together pass C together, unless every row's logits are wanted: those are large."""
    return [answers] if all_at_once else [[answer] for answer in answers]


def _see_prompt(turn: Turn) -> See:
    return lambda first, logits, _states: turn.see_prompt(first, logits)


def _first_decision(turn: Turn, decoder: Decoder) -> Decide:
    """What the prompt's last row decides; nothing if the prompt was all that was wanted."""

    def decide(logits: Tensor, states: Tensor) -> Decision:
        return Decision() if turn.finish_reason is not None else decoder.decide(None, logits, states)

    return decide


def _scoring(local: LocalSession, rows: tuple[EncodedRows, ...], decide: Decide | None, see: See, at: int) -> Work:
    """A work that shows all its rows to `see` before the last one decides."""

    def look(logits: Tensor, states: Tensor) -> Decision:
        see(at, logits, states)
        return decide(logits[-1:], states[-1:]) if decide is not None else Decision()

    return Work(local, rows, look, rows=sum(part.count for part in rows))
