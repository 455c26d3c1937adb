"""Keeping what was said for `train-drafter`, where the user asked for it (`--learn-from-chats`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from edge_client.speculation.transcripts import TranscriptStore
from edge_client.threads import in_thread
from split_llama.errors import CacheError


class Learner:
    """Appends transcripts beside the event loop; a full disk ends the learning, not the chat."""

    def __init__(self, store: TranscriptStore, notify: Callable[[str], None]) -> None:
        self._store = store
        self._notify = notify
        self._tasks: set[asyncio.Task[None]] = set()
        self._works = True
        notify(
            f"learning from chats: token ids of prompts and answers are kept in {store.path}, which is the text for "
            "whoever has the tokenizer; they stay on this machine"
        )

    def keep(self, tokens: Sequence[int]) -> None:
        """Keep one prompt with its answer."""
        if self._works:
            task = asyncio.create_task(self._keep(list(tokens)), name="learn")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait until all is written."""
        await asyncio.gather(*self._tasks)

    async def _keep(self, tokens: list[int]) -> None:
        try:
            await in_thread(lambda: self._store.append(tokens))
        except CacheError as error:
            self._works = False
            self._notify(f"no longer learning from chats: {error.message}")
