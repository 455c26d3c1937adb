"""The edge as a Python object: many concurrent sessions over one connection, their A and C batched in one thread.

    settings = EdgeSettings(server="http://127.0.0.1:8700", noise="0")
    async with EdgeRuntime.connect(settings, max_sessions=32) as edge:
        ids = edge.tokenizer.encode("Once upon a time")
        params = edge.params(max_new_tokens=64)
        async for event in edge.generate(ids, params):
            print(event.text, end="")
        # The same in steps, to get at the figures:
        async with edge.open() as session:
            turn = edge.turn(ids, params)
            async for event in session.generate(ids, turn):
                print(event.text, end="")
        print(turn.tokens, session.stats)

Importing this module imports torch, which takes a second or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edge_client.connector import Connector
from edge_client.conversations import Conversations
from edge_client.decoding import Pace
from edge_client.edge_model import EdgeModel, Placement
from edge_client.generate import EdgeSession
from edge_client.learning import Learner
from edge_client.link import ServerLink
from edge_client.model_source import ModelSource, find_model, read_geometry
from edge_client.rest import ModelCard, RestClient
from edge_client.sampling import SamplingParams
from edge_client.session import RemoteSession
from edge_client.settings import EdgeSettings
from edge_client.speculate import MakePace, make_pace
from edge_client.speculation.find import make_drafter
from edge_client.speculation.head_file import ends_digest
from edge_client.speculation.transcripts import TranscriptStore
from edge_client.state_files import StateFolder, cache_errors, write_atomically
from edge_client.threads import in_thread
from edge_client.tokenizer import EdgeTokenizer
from edge_client.turn import GenerationParams, TokenEvent, Turn
from edge_client.weights import Progress
from edge_client.work import LocalSession, PhaseTimes
from edge_client.worker import EdgeWorker
from split_llama.checkpoint import Checkpoint
from split_llama.errors import ContextExceeded, FlLlamaError, UsageError
from split_llama.load import parse_device, parse_dtype, set_up_cpu
from split_llama.noise import NoiseScope, NoiseSpec, PrefixNoise, calibrate_clip
from split_llama.products import Numerics
from split_llama.wire.codec import Codec
from split_llama.wire.control import Open


class EdgeRuntime:
    """A connected edge. Made by `connect`; lives in one event loop."""

    def __init__(
        self,
        source: ModelSource,
        model: EdgeModel,
        spec: NoiseSpec,
        link: ServerLink,
        next_pace: MakePace,
        max_sessions: int,
        learner: Learner | None = None,
    ) -> None:
        self.source = source
        self.noise = spec
        self.tokenizer = EdgeTokenizer.open(source.folder)
        self.max_length = min(source.card.max_model_len, model.config.max_position_embeddings)
        self.defaults = model.defaults
        self.model = model
        self._link = link
        self.worker = EdgeWorker(model)
        self._next_pace = next_pace
        self._pace: Pace | None = None
        self._learner = learner
        self.conversations = Conversations(
            self._open, self._fork, self._close, most_sessions=max_sessions, most_tokens=max_sessions * self.max_length
        )

        link.on_refusal = self.conversations.give_up_one

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        settings: EdgeSettings,
        *,
        max_sessions: int = 1,
        source: ModelSource | None = None,
        progress: Progress | None = None,
        notify: Callable[[str], None] = lambda line: None,
    ) -> AsyncIterator[EdgeRuntime]:
        """Find the weights (unless `source` is given), load them, connect, and clean everything up at the end.

        `max_sessions` bounds the sessions open at once: the edge keeps KV pages for as many. Raises `FlLlamaError`.
        """
        if source is None:
            source = await in_thread(lambda: prepare(settings, progress=progress, notify=notify))
        found = source
        async with ServerLink(Connector.of(settings), reconnect_seconds=settings.reconnect_seconds) as link:
            model, spec = await in_thread(lambda: _load(settings, found, max_sessions, notify))
            learner = _learner(settings, found, notify)
            runtime = cls(found, model, spec, link, make_pace(settings), max_sessions, learner)
            async with contextlib.AsyncExitStack() as closing:
                closing.push_async_callback(runtime.worker.close)
                closing.push_async_callback(runtime.conversations.clear)
                if learner is not None:
                    closing.push_async_callback(learner.close)
                yield runtime

    @property
    def error(self) -> FlLlamaError | None:
        """Why no answer can be made at the moment, if that is so: the server was lost, or this edge is broken."""
        return self.worker.fault or self._link.error

    @property
    def rows_released(self) -> int:
        """Distinct noised rows sent by this process; 0 with noise off, when nothing keeps rows apart."""
        return self.model.accountant.rows

    @property
    def times(self) -> PhaseTimes:
        """Seconds that this edge has computed so far, by phase."""
        return self.model.times

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[EdgeSession]:
        """Open a session; it is closed on the server when the block ends, however it ends."""
        session = await self._open()
        try:
            yield session
        finally:
            await self._close(session)

    async def final_states(self, ids: Sequence[int]) -> Tensor:
        """Run `ids` through the whole model; give the final norm's outputs `[n, d]`, float32 on the CPU.

        The rows are sent to the server like those of any prompt, noise and all, and count as released.
        """
        pieces: list[Tensor] = []
        async with self.open() as session:
            await session.prefill(ids, lambda _first, _logits, states: pieces.append(states.clone()))
        return torch.cat(pieces)

    async def _open(self) -> EdgeSession:
        source = self.source
        opening = Open(
            session="0" * 32,
            secret="0" * 64,
            blocks=(source.server_blocks.start, source.server_blocks.stop),
            geometry=source.card.geometry,
            weights=source.offer.manifest.digest,
            tokenizer=source.offer.manifest.tokenizer_digest,
            adapter=None if source.adapter is None else source.adapter.name,
        )
        return self._session(self.model.open(self.max_length), self._link.open(opening), ())

    async def _fork(self, parent: EdgeSession, at: int) -> EdgeSession:
        tokens = parent.tokens[:at]
        forking = asyncio.ensure_future(self.worker.ask(lambda: parent.local.fork(at)))
        try:
            local = await asyncio.shield(forking)
        except asyncio.CancelledError:
            forking.add_done_callback(self._free_unwanted)
            raise
        try:
            remote = self._link.fork(parent.remote, at)
        except FlLlamaError:
            self.worker.call(local.free)
            raise
        return self._session(local, remote, tokens)

    def _free_unwanted(self, forking: asyncio.Future[LocalSession]) -> None:
        """Whoever asked for a fork left while it was made."""
        if not forking.cancelled() and forking.exception() is None:
            self.worker.call(forking.result().free)

    def _session(self, local: LocalSession, remote: RemoteSession, tokens: Sequence[int]) -> EdgeSession:
        return EdgeSession(
            local,
            remote,
            self.worker,
            all_rows=self.source.partition.q > 0,
            codec=self.model.codec,
            max_length=self.max_length,
            # A session begins with what the last answer taught about link and guesses.
            pace=self._next_pace(self._pace),
            tokens=tokens,
            finished=self._finished,
        )

    def _finished(self, session: EdgeSession, tokens: Sequence[int]) -> None:
        if session.pace is not None:
            self._pace = session.pace
        if self._learner is not None:
            self._learner.keep(tokens)

    async def _close(self, session: EdgeSession) -> None:
        self.worker.call(session.local.free)
        await self._link.close(session.remote)

    async def generate(self, prompt_ids: Sequence[int], params: GenerationParams) -> AsyncIterator[TokenEvent]:
        """Make one answer in a session of its own: tokens and text as they come. Raises as `turn` does."""
        turn = self.turn(prompt_ids, params)
        async with self.open() as session:
            async for event in session.generate(prompt_ids, turn):
                yield event

    def params(
        self, *, max_new_tokens: int = 256, stop: Sequence[str] = (), ignore_eos: bool = False, **sampling: Any
    ) -> GenerationParams:
        """Fill in the checkpoint's defaults. `sampling` takes the fields of `SamplingParams`; None is a default too."""
        return GenerationParams(
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams.resolve(self.defaults, **sampling),
            stop=tuple(stop),
            eos_token_ids=() if ignore_eos else self.defaults.eos_token_ids,
        )

    def turn(self, prompt_ids: Sequence[int], params: GenerationParams) -> Turn:
        """Start an answer. Raises `ContextExceeded` for a prompt without room for one token, `UsageError` for none."""
        if not prompt_ids:
            raise UsageError("the prompt is empty, and this model has no BOS token to begin with; give some text")
        vocabulary = self.model.config.vocab_size
        if not all(0 <= token < vocabulary for token in prompt_ids):
            raise UsageError(f"the prompt has token ids outside the model's vocabulary of {vocabulary}")
        if len(prompt_ids) >= self.max_length:
            raise ContextExceeded(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.max_length}, and at least one is "
                "needed for the answer; nothing was sent. Shorten the prompt"
            )
        # The last token is never fed, so the answer may be one longer than what is left.
        room = self.max_length - len(prompt_ids) + 1
        return Turn(params, prompt_ids, room, self.tokenizer)


def prepare(
    settings: EdgeSettings,
    *,
    card: ModelCard | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> ModelSource:
    """Do what `connect` does first: ask the server, find and check the weights. Blocking.

    `card` is the server's model card, if it was asked for already.
    """
    rest = RestClient.of(settings)
    try:
        return find_model(settings, rest, StateFolder(settings.states()), card=card, progress=progress, notify=notify)
    finally:
        rest.close()


def _load(
    settings: EdgeSettings, source: ModelSource, max_sessions: int, notify: Callable[[str], None]
) -> tuple[EdgeModel, NoiseSpec]:
    set_up_cpu(settings.threads)
    device = parse_device(settings.device)
    name = settings.dtype
    if name == "auto":
        name = source.card.dtype if device.type == "cuda" else "float32"
    numerics = Numerics(parse_dtype(name), settings.quantization, device)
    # As many again for conversations that wait for their next turn; memory is taken when it is first written to.
    sessions = 2 * max_sessions
    positions = min(source.card.max_model_len, _context(source)) * sessions
    placement = Placement(numerics, positions, sessions)
    checkpoint = Checkpoint.open(source.folder)
    own = None if source.adapter is None else source.adapter.own
    model = EdgeModel(checkpoint, source.partition, Codec.parse(settings.codec), placement, own)
    if model.bos_token_id is None:
        model.bos_token_id = EdgeTokenizer.open(source.folder).bos_token_id
    if settings.speculate != "off":
        model.drafter = make_drafter(settings.drafter, checkpoint, settings.states(), notify=notify)
    spec = _noise(settings, source, model, numerics.label)
    if spec.is_on:
        scope = NoiseScope(
            model=source.offer.manifest.digest,
            adapter=_sent_digest(source),
            blocks=source.server_blocks,
            width=model.width,
            # The same weights give other states in another compute type or on another kind of device.
            numerics=f"{numerics.label} {numerics.compute} {numerics.device.type}",
            spec=spec,
        )
        model.use_noise(spec, PrefixNoise(StateFolder(settings.states()).secret(), scope))
    return model, spec


def _sent_digest(source: ModelSource) -> str:
    """Give the digest of the adapter in A; empty without any."""
    blocks = source.partition.segment_a(source.card.num_hidden_layers)
    return "" if source.adapter is None else source.adapter.sent_digest(blocks)


def _learner(settings: EdgeSettings, source: ModelSource, notify: Callable[[str], None]) -> Learner | None:
    if not settings.learn_from_chats:
        return None
    return Learner(TranscriptStore(settings.states(), ends_digest(Checkpoint.open(source.folder))), notify)


def _context(source: ModelSource) -> int:
    return read_geometry(source.folder).max_position_embeddings


def _noise(settings: EdgeSettings, source: ModelSource, model: EdgeModel, dtype: str) -> NoiseSpec:
    spec = NoiseSpec.parse(settings.noise)
    if spec.is_on and settings.clip != "auto":
        return dataclasses.replace(spec, clip=float(settings.clip))
    if not spec.sigma:
        return spec
    # An adapter's states are longer or shorter than the model's own.
    adapter = _sent_digest(source)[:32]
    path = settings.caches() / "clip" / "-".join(filter(None, (source.offer.manifest.digest[:32], adapter, dtype)))
    if path.is_file():
        with contextlib.suppress(ValueError):
            return dataclasses.replace(spec, clip=float(path.read_text()))
    clip = calibrate_clip(model.output_norms())
    with cache_errors("remember the clip norm in"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, repr(clip).encode())
    return dataclasses.replace(spec, clip=clip)
