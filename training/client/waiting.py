"""Why a client hears nothing from its job: whom or what it waits for, asked of the server now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from split_llama.errors import FlLlamaError
from training.client.loop import JobLoop
from training.client.report import Reporter
from training.job_config import JobConfig

QUIET_SECONDS = 5.0

Status = Mapping[str, Any]


def why_waiting(status: Status, config: JobConfig) -> str:
    """Say in words why a job stands still, by its status; nothing where it only takes its time. Pure."""
    members = status.get("members") or []
    here = sum(bool(member.get("present")) for member in members)
    if status.get("state") == "paused":
        return "the job is paused; it goes on when its creator resumes it"
    if not status.get("generation"):
        missing = config.clients - here
        clients = "client" if missing == 1 else "clients"
        return f"waiting for {missing} more {clients} ({here} of {config.clients} are here)" if missing > 0 else ""
    away = [str(member.get("name")) for member in members if not member.get("present")]
    if status.get("state") != "waiting" or not away:
        return ""
    return f"waiting for {', '.join(away)}, whose connection is gone, for up to {config.rejoin_seconds:.0f} seconds"


async def tell_why(loop: JobLoop, config: JobConfig, ask: Callable[[], Status], reporter: Reporter) -> None:
    """Tell why nothing comes, whenever the reason is another; runs until it is cancelled. `ask` may block."""
    said = ""
    while True:
        await asyncio.sleep(QUIET_SECONDS / 2)
        if loop.quiet_seconds < QUIET_SECONDS:
            said = ""
            continue
        try:
            why = why_waiting(await asyncio.to_thread(ask), config)
        except FlLlamaError:
            continue  # The link says it when the server is gone.
        if why and why != said:
            reporter.note(why)
        said = why
