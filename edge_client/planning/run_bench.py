"""`edge-client bench` behind its flags."""

from __future__ import annotations

import asyncio
import json
import sys

from edge_client.planning import bench_report
from edge_client.planning.bench import Bench, BenchPlan, BenchResult
from edge_client.planning.talk import Notify, notifier
from edge_client.rest import ModelCard
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from edge_client.threads import in_thread


def bench(settings: EdgeSettings, plan: BenchPlan, card: ModelCard, *, as_json: bool, quiet: bool) -> None:
    """Measure, then print the report on stdout. Raises `FlLlamaError`."""
    result = asyncio.run(_bench(settings, plan, card, notifier(quiet)))
    text = json.dumps(bench_report.as_json(result)) + "\n" if as_json else bench_report.as_text(result)
    sys.stdout.write(text)


async def _bench(settings: EdgeSettings, plan: BenchPlan, card: ModelCard, notify: Notify) -> BenchResult:
    source = await in_thread(lambda: prepare(settings, card=card, notify=notify))
    async with EdgeRuntime.connect(settings, source=source, notify=notify) as edge:
        return await Bench(settings, plan, edge).run(notify)
