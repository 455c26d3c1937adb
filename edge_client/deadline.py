"""A limit on how long an answer may take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from split_llama.errors import DeadlineExceeded


@contextlib.asynccontextmanager
async def deadline(seconds: float | None) -> AsyncIterator[None]:
    """Bound what the block waits for; `None` is no limit. Raises `DeadlineExceeded` when the time is over."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"the answer was not complete after {seconds:g} seconds, the limit that was set; give it more time "
            "(--request-timeout), or ask for fewer tokens"
        ) from error
