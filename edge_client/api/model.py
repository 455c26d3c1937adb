"""`SplitModelForCausalLM`: generate, forward and hidden states through a server, from ordinary synchronous code."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
from types import TracebackType
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from edge_client.api.answers import Answers, Row, run_all
from edge_client.api.batch import Batch, Ids
from edge_client.api.hidden import HiddenStates, join, trace
from edge_client.api.loop_thread import LoopThread
from edge_client.api.options import (
    GenerateKeywords,
    GenerateOptions,
    check_keywords,
    end_tokens,
    pad_token,
    read_options,
)
from edge_client.api.outputs import CausalOutput, GenerateOutput, by_step, states_by_step
from edge_client.api.tokenizer import ApiTokenizer
from edge_client.runtime import EdgeRuntime
from edge_client.settings import SECTION, EdgeSettings
from edge_client.turn import GenerationParams
from split_llama.errors import UsageError
from split_llama.settings import load_settings


class Streamer(Protocol):
    """Whatever transformers takes for a streamer: `put` gets the prompt `[1, n]`, then each token `[1]`."""

    def put(self, value: Tensor) -> None:
        """Take ids."""
        ...

    def end(self) -> None:
        """The answer is over."""
        ...


class SplitModelForCausalLM:
    """A model whose middle blocks run on a server. Use it as a context manager, or `close` it.

    Its methods may be called from several threads. `tokenizer` is the model's own, `edge` the `EdgeRuntime` behind it.
    """

    def __init__(self, settings: EdgeSettings, max_batch_size: int = 8) -> None:
        """Connect; rather use `from_server`."""
        self.settings = settings
        self._loop = LoopThread()
        self._stack = contextlib.AsyncExitStack()
        try:
            self.edge = self._loop.run(self._connect(max_batch_size))
            self._answers = Answers(self.edge, max_batch_size, settings.request_timeout)
            self.tokenizer = ApiTokenizer(self.edge.source.folder)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_server(
        cls, url: str, *, partition: str | tuple[int, int] | None = None, max_batch_size: int = 8, **settings: Any
    ) -> SplitModelForCausalLM:
        """Connect to the server at `url`.

        `settings` are the fields of `EdgeSettings` (`noise`, `codec`, `speculate`, `api_key`, `device` ...); what is
        not given comes from environment and configuration file, as for the commands. `max_batch_size` rows are worked
        on at once, the others wait. Raises `FlLlamaError`, and `TypeError` for a name that is no setting.
        """
        known = [field.name for field in dataclasses.fields(EdgeSettings)]
        check_keywords("from_server", list(settings), [*known, "max_batch_size"])
        if max_batch_size < 1:
            raise UsageError(f"max_batch_size must be 1 or more, got {max_batch_size}")
        pair = partition if partition is None or isinstance(partition, str) else ",".join(map(str, partition))
        loaded = load_settings(EdgeSettings, SECTION, settings | {"server": url, "partition": pair})
        loaded.settings.check()
        return cls(loaded.settings, max_batch_size)

    def __enter__(self) -> SplitModelForCausalLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all sessions and the connection. May be called twice."""
        try:
            with contextlib.suppress(UsageError):
                self._loop.run(self._stack.aclose())
        finally:
            self._loop.close()

    @property
    def device(self) -> torch.device:
        """Where ids are expected and results are: the CPU, wherever the edge computes."""
        return torch.device("cpu")

    @property
    def rows_released(self) -> int:
        """Distinct noised rows sent to the server so far."""
        return self.edge.rows_released

    def generate(
        self,
        input_ids: Ids | None = None,
        attention_mask: Any = None,
        *,
        streamer: Streamer | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Tensor | GenerateOutput:
        """Generate for each row of `input_ids`; give ids `[rows, n + new]`, or a `GenerateOutput` when asked for one.

        The keywords mean what they mean in transformers (`docs/python-api.md` has the differences). Raises
        `FlLlamaError`, and `TypeError` for a keyword that is none.
        """
        defaults = self.edge.defaults
        known = [*GenerateKeywords.__annotations__, "input_ids", "attention_mask", "streamer"]
        check_keywords("generate", list(keywords), known)
        batch = self._read(input_ids, attention_mask, keywords)
        options = read_options(
            keywords,
            defaults,
            pad=self.tokenizer.pad_token_id,
            width=batch.width,
            usual_new_tokens=self.settings.max_new_tokens,
        )
        if streamer is None:
            rows = self._loop.run(self._answers.generate(batch, options, lambda _event: None))
        else:
            rows = self._stream(batch, options, streamer)
        return self._output(batch, options, rows)

    def forward(self, input_ids: Ids, attention_mask: Any = None) -> CausalOutput:
        """Give the logits of all positions. Raises `FlLlamaError`."""
        batch = self._read(input_ids, attention_mask, {})

        async def logits(ids: tuple[int, ...]) -> Tensor:
            pieces: list[Tensor] = []
            async with self._answers.places, self.edge.open() as session:
                await session.prefill(ids, lambda _first, logits, _states: pieces.append(logits.clone()))
            return torch.cat(pieces)

        return CausalOutput(batch.stack(self._loop.run(run_all(logits(row) for row in batch.rows))))

    __call__ = forward

    def hidden_states(self, input_ids: Ids, attention_mask: Any = None) -> HiddenStates:
        """Run the ids through all segments and give what passes between them. Raises `FlLlamaError`.

        The rows are sent like those of any prompt, and count as released.
        """
        batch = self._read(input_ids, attention_mask, {})

        async def states(ids: tuple[int, ...]) -> Any:
            async with self._answers.places:
                return await trace(self.edge, ids)

        return join(batch, self._loop.run(run_all(states(row) for row in batch.rows)))

    def _read(self, input_ids: Ids | None, attention_mask: Any, keywords: GenerateKeywords) -> Batch:
        """Read ids and mask, and check them as far as the model is needed for it."""
        bos = self.edge.defaults.bos_token_id
        if input_ids is None:
            if bos is None:
                raise UsageError("without input_ids an answer begins at BOS, and this model has none; give input_ids")
            input_ids = [[bos]]
        eos = end_tokens(keywords, self.edge.defaults)
        known_pad = self.tokenizer.pad_token_id
        pad = pad_token(keywords, (), known_pad) if known_pad is not None or "pad_token_id" in keywords else None
        batch = Batch.read(input_ids, attention_mask, pad=pad, ends=eos)
        for row in batch.rows:
            self.edge.turn(row, GenerationParams(max_new_tokens=1))
        return batch

    async def _connect(self, max_batch_size: int) -> EdgeRuntime:
        edge = EdgeRuntime.connect(self.settings, max_sessions=max_batch_size)
        return await self._stack.enter_async_context(edge)

    def _stream(self, batch: Batch, options: GenerateOptions, streamer: Streamer) -> list[Row]:
        """Generate one row; the streamer is called in the caller's thread, where it may take its time."""
        if len(batch.rows) * options.sequences > 1:
            raise UsageError("a streamer takes one sequence: give one row, and num_return_sequences=1")
        events: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        async def generate() -> list[Row]:
            try:
                return await self._answers.generate(batch, options, lambda event: events.put(event.token))
            finally:
                events.put(None)

        streamer.put(batch.ids(options.pad))
        future = self._loop.start(generate())
        try:
            while (token := events.get()) is not None:
                streamer.put(torch.tensor([token]))
            rows = future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            streamer.end()
        return rows

    def _output(self, batch: Batch, options: GenerateOptions, rows: list[Row]) -> Tensor | GenerateOutput:
        prompts = batch.ids(options.pad).repeat_interleave(options.sequences, dim=0)
        new = max(len(row.tokens) for row in rows)
        answers = [list(row.tokens) + [options.pad] * (new - len(row.tokens)) for row in rows]
        sequences = torch.cat((prompts, torch.tensor(answers, dtype=torch.int64)), dim=1)
        if not options.as_object:
            return sequences
        recorded = [(row, row.recorder) for row in rows if row.recorder is not None]
        scores = [recorder.scores(row.prompt, row.tokens, options.sampling) for row, recorder in recorded]
        return GenerateOutput(
            sequences=sequences,
            scores=by_step(scores) if options.scores else None,
            logits=by_step([recorder.logits for _, recorder in recorded]) if options.logits else None,
            hidden_states=self._states(batch.width, rows) if options.hidden_states else None,
            stats=tuple(row.stats for row in rows),
            finish_reasons=tuple(row.finish_reason for row in rows),
        )

    def _states(self, width: int, rows: list[Row]) -> tuple[tuple[Tensor], ...]:
        """Final states of finished sequences, by one more pass over them: the same rows, hence no other release."""

        async def states(row: Row) -> Tensor:
            async with self._answers.places:
                # An answer's last token was never fed.
                return await self.edge.final_states((*row.prompt, *row.tokens[:-1]))

        found = self._loop.run(run_all(states(row) for row in rows))
        new = max(len(row.tokens) for row in rows)
        joined = torch.zeros(len(rows), width + new - 1, found[0].shape[-1])
        for into, row, each in zip(joined, rows, found, strict=True):
            start = width - len(row.prompt)
            into[start : start + len(each)] = each
        return states_by_step(joined, width)
