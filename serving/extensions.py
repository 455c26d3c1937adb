"""Extensions: found by their entry points, given a host, and told of clients that join them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from serving.admission import check_digests, check_request
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.errors import BadRequest, PartitionNotAllowed, UsageError
from split_llama.extension import ENTRY_POINTS, Extension, Guest, Send
from split_llama.extras import needs_extra
from split_llama.layers import FusedLinear, Segment
from split_llama.load import load_segment
from split_llama.settings import nearest
from split_llama.wire.control import Open
from split_llama.wire.frame import Frame

if TYPE_CHECKING:
    from serving.core import Core
    from serving.hosted import Hosted

T = TypeVar("T")

log = logging.getLogger("fl_llama.extensions")


class CoreHost:
    """A `split_llama.extension.Host` over a `Core`."""

    def __init__(self, core: Core, name: str) -> None:
        self._core = core
        self._name = name
        self._dense: dict[torch.dtype, Segment] = {}
        self._loading = Lock()

    @property
    def _hosted(self) -> Hosted:
        return self._core.hosted

    @property
    def is_ready(self) -> bool:
        """Say whether the model is loaded."""
        return self._core.is_ready

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return self._hosted.name

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint behind it."""
        return self._hosted.checkpoint

    @property
    def blocks(self) -> BlockRange:
        """The blocks that are hosted."""
        return self._hosted.blocks

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        return self._hosted.engine.segment.device

    @property
    def max_frame_bytes(self) -> int:
        """Bytes of the largest frame."""
        return self._hosted.max_frame_bytes

    @cached_property
    def folder(self) -> Path:
        """Where the extension may keep files."""
        return self._core.settings.extension_folder() / self._name

    @property
    def plugins(self) -> tuple[str, ...]:
        """Names of code that clients may ask for."""
        return self._core.settings.extension_plugin

    @property
    def memory_bytes(self) -> int:
        """How much memory the extension may use for what is under way."""
        return self._core.settings.extension_bytes

    def authenticate(self, authorization: str | None) -> str:
        """Give the owner of an Authorization header's key. Raises `Unauthenticated`."""
        return self._core.keys.authenticate(authorization).owner

    async def check_model(
        self, blocks: BlockRange, geometry: str | None, weights: str | None, tokenizer: str | None
    ) -> None:
        """Check a client's digests; see `Host.check_model`."""
        hosted = self._hosted
        opening = Open(
            session="0" * 32,
            secret="0" * 64,
            blocks=(blocks.start, blocks.stop),
            geometry=geometry,
            weights=weights,
            tokenizer=tokenizer,
        )
        check_request(hosted, opening)
        if not hosted.blocks.contains(blocks):
            raise PartitionNotAllowed(f"blocks {blocks} asked for, blocks {hosted.blocks} are hosted here")
        if weights is not None or tokenizer is not None:
            await check_digests(hosted, opening)

    def dense_segment(self, dtype: torch.dtype) -> Segment:
        """Give the hosted blocks as dense matrices; those of inference where they are dense and of that type."""
        with self._loading:
            if dtype not in self._dense:
                self._dense[dtype] = self._own_dense(dtype)
            return self._dense[dtype]

    def _own_dense(self, dtype: torch.dtype) -> Segment:
        segment = self._hosted.engine.segment
        matrices = [module for module in segment.modules() if isinstance(module, FusedLinear)]
        if all(matrix.weight is not None and matrix.weight.dtype == dtype == segment.dtype for matrix in matrices):
            return segment
        log.info("loading dense weights extension=%s dtype=%s blocks=%s", self._name, dtype, segment.blocks)
        return load_segment(self.checkpoint, segment.blocks, dtype=dtype, device=segment.device)

    async def compute(self, work: Generator[None, None, T]) -> T:
        """Run a generator in the thread that computes; see `Host.compute`."""
        return await self._core.worker.background.compute(work)

    async def in_background(self, work: Callable[[], T]) -> T:
        """Run something blocking in a thread of its own."""
        return await asyncio.to_thread(work)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        """Make a Prometheus counter."""
        return self._core.metrics.counter(name, text, tuple(labels))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge."""
        self._core.metrics.gauge(name, text, read)


class Extensions:
    """The extensions of one server."""

    def __init__(self, extensions: Iterable[Extension] = ()) -> None:
        self._extensions = list(extensions)

    def __len__(self) -> int:
        return len(self._extensions)

    @classmethod
    def find(cls, core: Core, names: Iterable[str]) -> Extensions:
        """Make those named. Raises `UsageError` for one that is not installed."""
        known = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        made = []
        for name in dict.fromkeys(names):
            if name not in known:
                raise UsageError(f"--extension {name}: no such extension is installed{nearest(name, known)}")
            with needs_extra("train"):
                make = known[name].load()
            made.append(make(CoreHost(core, name)))
        return cls(made)

    def routers(self) -> list[Any]:
        """Give the REST routes of all."""
        return [extension.router() for extension in self._extensions]

    def join(self, frame: Frame, owner: str, send: Send) -> Guest:
        """Hand a JOIN to the extension that takes it. Raises `FlLlamaError`."""
        if not self._extensions:
            raise BadRequest("this server runs no fine-tuning: its operator can start it with --extension training")
        return self._extensions[0].join(frame, owner, send)

    async def start(self) -> None:
        """Begin, now that the model is there."""
        for extension in self._extensions:
            await extension.start()

    async def close(self) -> None:
        """End all; one that fails does not keep the others from ending."""
        for extension in self._extensions:
            try:
                await extension.close()
            except Exception:
                log.exception("an extension could not end in order name=%s", extension.name)
