"""More sessions than KV pages: the server takes pages from idle ones and refuses steps, and no text changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import psutil
import torch
from conftest import TinyCheckpoint
from live_server import live_server
from prometheus_client.parser import text_string_to_metric_families

from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from split_llama.checkpoint import Checkpoint
from split_llama.engine.engine import PAGE_SIZE
from split_llama.engine.kv_cache import kv_page_bytes

SESSIONS, PAGES, TOKENS = 8, 22, 60


async def generate_all(url: str, folder: Path, home: Path) -> list[list[int]]:
    settings = EdgeSettings(
        server=url, model=str(folder), noise="0.01", codec="fp16", threads=1, cache_dir=home / "c", state_dir=home / "s"
    )

    async def one(edge: EdgeRuntime, start: int) -> list[int]:
        prompt = [1, *range(10 + start, 30 + start)]
        async with edge.open() as session:
            turn = edge.turn(prompt, edge.params(max_new_tokens=TOKENS, ignore_eos=True, temperature=0.0))
            async for _ in session.generate(prompt, turn):
                # Pauses of different lengths, so that there is always somebody idle to take pages from.
                await asyncio.sleep(0.01 * (start % 3))
            return turn.tokens

    async with EdgeRuntime.connect(settings, max_sessions=SESSIONS) as edge:
        return await asyncio.gather(*(one(edge, start) for start in range(SESSIONS)))


def counter(url: str, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_texts_survive_a_cache_too_small_for_all(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    page = kv_page_bytes(Checkpoint.open(folder).config, 2, PAGE_SIZE, torch.float32)
    fraction = PAGES * page / psutil.virtual_memory().available
    small = ["--gpu-memory-utilization", f"{fraction:.12f}", "--evict-seconds", "0.05", "--max-model-len", "96"]
    with live_server(folder, "--max-model-len", "96") as url:
        want = asyncio.run(generate_all(url, folder, tmp_path))
    with live_server(folder, *small) as url:
        got = asyncio.run(generate_all(url, folder, tmp_path))
        evictions = counter(url, "fl_llama_evictions_total")
    assert got == want
    assert evictions > 0, "the cache was large enough, so nothing was tested"
    assert len({tuple(text) for text in want}) > 1
