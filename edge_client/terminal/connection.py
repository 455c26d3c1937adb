"""The edge that the chat talks through; made anew when a setting changes or the server was lost for too long."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping

from edge_client.chat_template import ChatTemplate, load_template
from edge_client.model_source import ModelSource
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from edge_client.threads import in_thread
from edge_client.weights import Progress
from split_llama.errors import ServerUnreachable, UsageError
from split_llama.noise import Accountant

# The conversation, and what an answer to it is made on.
MAX_SESSIONS = 2
FIRST_WAIT, LONGEST_WAIT = 0.5, 3.0


class Connection:
    """Gives a connected edge when one is wanted. `rows_released` counts over all edges there were."""

    def __init__(
        self, settings: EdgeSettings, source: ModelSource, notify: Callable[[str], None], progress: Progress
    ) -> None:
        self.settings = settings
        self.source = source
        self.template = ChatTemplate.compile(load_template(source.folder))
        self._notify = notify
        self._progress = progress
        self._stack = contextlib.AsyncExitStack()
        self._edge: EdgeRuntime | None = None
        # One for all edges: what another edge sends again with the same noise is the same release.
        self._accountant = Accountant()

    @property
    def is_open(self) -> bool:
        """Whether an edge is there."""
        return self._edge is not None

    @property
    def current(self) -> EdgeRuntime | None:
        """The edge that is there."""
        return self._edge

    @property
    def rows_released(self) -> int:
        """Distinct noised rows sent so far."""
        return self._accountant.rows

    async def edge(self) -> EdgeRuntime:
        """Give the edge; connect if there is none, and wait for the server. Raises `FlLlamaError`."""
        if self._edge is None:
            self._edge = await self._connect()
            self._edge.model.accountant = self._accountant
        return self._edge

    async def change(self, changes: Mapping[str, str]) -> None:
        """Use other settings from now on, through another edge. Where they cannot be used, nothing changes.

        Then the next edge is made from the old ones, when it is wanted. Raises `FlLlamaError`.
        """
        settings = _checked(self.settings, changes)
        source = self.source
        if settings.partition != self.settings.partition:
            source = await in_thread(lambda: prepare(settings, progress=self._progress, notify=self._notify))
        before = self.settings, self.source
        await self.drop()
        self.settings, self.source = settings, source
        try:
            await self.edge()
        except BaseException:
            # An interrupted wait for the server included.
            self.settings, self.source = before
            raise

    async def drop(self) -> None:
        """Close the edge; the next one is made when it is wanted."""
        self._edge = None
        await self._stack.aclose()

    async def _connect(self) -> EdgeRuntime:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.reconnect_seconds
        wait = FIRST_WAIT
        while True:
            try:
                edge = EdgeRuntime.connect(self.settings, source=self.source, max_sessions=MAX_SESSIONS)
                return await self._stack.enter_async_context(edge)
            except ServerUnreachable as error:
                if loop.time() + wait > deadline:
                    raise
                if wait == FIRST_WAIT:
                    self._notify(f"{error.message}; waiting up to {self.settings.reconnect_seconds:.0f} s for it")
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def _checked(settings: EdgeSettings, changes: Mapping[str, str]) -> EdgeSettings:
    """Give the settings with these changes. Raises `UsageError`."""
    checks = {field.name: field.metadata.get("check") for field in dataclasses.fields(EdgeSettings)}
    for name, value in changes.items():
        try:
            checks[name](value)  # type: ignore[misc]
        except ValueError as error:
            raise UsageError(f"cannot use {value!r} for {name}: {error}") from error
    changed = dataclasses.replace(settings, **changes)  # type: ignore[arg-type]
    changed.check()
    return changed
