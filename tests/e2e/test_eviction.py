"""More sessions than KV pages: the server takes pages from idle ones and lets steps wait, and no text changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import psutil
import pytest
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
PROMPT = [1, *range(10, 30)]


async def generate_all(url: str, folder: Path, home: Path) -> list[list[int]]:
    settings = EdgeSettings(
        server=url, model=str(folder), noise="0.01", codec="fp32", threads=1, cache_dir=home / "c", state_dir=home / "s"
    )

    async def one(edge: EdgeRuntime, start: int) -> list[int]:
        prompt = [1, *range(10 + start, 30 + start)]
        async with edge.open() as session:
            turn = edge.turn(prompt, edge.params(max_new_tokens=TOKENS, ignore_eos=True, temperature=0.0))
            async for _ in session.generate(prompt, turn):
                # Now and then a pause long enough for the others to take the pages.
                await asyncio.sleep(0.4 if len(turn.tokens) % 25 == 3 * start else 0.0)
            return turn.tokens

    async with EdgeRuntime.connect(settings, max_sessions=SESSIONS) as edge:
        return await asyncio.gather(*(one(edge, start) for start in range(SESSIONS)))


def counter(url: str, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text)
    found = [sample for family in families for sample in family.samples if sample.name == f"fl_llama_{name}"]
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


@pytest.mark.parametrize("kind", ["dropped", "swapped"])
def test_texts_survive_a_cache_too_small_for_all(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint()
    page = kv_page_bytes(Checkpoint.open(folder).config, 2, PAGE_SIZE, torch.float32)
    fraction = PAGES * page / psutil.virtual_memory().available
    small = ["--gpu-memory-utilization", f"{fraction:.12f}", "--evict-seconds", "0.1", "--max-model-len", "96"]
    if kind == "swapped":
        small += ["--swap-space", "0.01"]
    with live_server(folder, "--max-model-len", "96") as url:
        want = asyncio.run(generate_all(url, folder, tmp_path))
    with live_server(folder, *small) as url:
        got = asyncio.run(generate_all(url, folder, tmp_path))
        evictions, others = counter(url, "evictions_total", kind=kind), counter(url, "evictions_total")
        back, left = counter(url, "swap_ins_total"), counter(url, "kv_swap_used_bytes")
    assert got == want
    assert evictions > 0, "the cache was large enough, so nothing was tested"
    assert others == evictions
    assert (back > 0, left) == (kind == "swapped", 0)
    assert len({tuple(text) for text in want}) > 1


def test_an_answer_goes_on_from_host_memory_without_a_difference(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """One long answer in exact numbers, with another session taking its pages in the middle of it, twice."""
    folder = tiny_checkpoint()
    page = kv_page_bytes(Checkpoint.open(folder).config, 2, PAGE_SIZE, torch.float32)
    fraction = 8.5 * page / psutil.virtual_memory().available
    small = ["--gpu-memory-utilization", f"{fraction:.12f}", "--evict-seconds", "0.1", "--swap-space", "0.01"]

    async def answer(url: str, interrupted: bool) -> list[int]:
        settings = EdgeSettings(
            server=url, model=str(folder), codec="fp32", threads=1, cache_dir=tmp_path / "c", state_dir=tmp_path / "s"
        )
        async with EdgeRuntime.connect(settings, max_sessions=2) as edge, edge.open() as session:
            turn = edge.turn(PROMPT, edge.params(max_new_tokens=90, ignore_eos=True, temperature=0.0))
            async for _ in session.generate(PROMPT, turn):
                if interrupted and len(turn.tokens) in (20, 50):
                    await asyncio.sleep(0.2)
                    await disturb(edge)
            return turn.tokens

    async def disturb(edge: EdgeRuntime) -> None:
        prompt = [1, *range(5, 100)]
        async with edge.open() as other:
            turn = edge.turn(prompt, edge.params(max_new_tokens=10, ignore_eos=True, temperature=0.0))
            async for _ in other.generate(prompt, turn):
                pass

    with live_server(folder, "--max-model-len", "112") as url:
        want = asyncio.run(answer(url, interrupted=False))
    with live_server(folder, "--max-model-len", "112", *small) as url:
        got = asyncio.run(answer(url, interrupted=True))
        figures = [counter(url, name) for name in ("swap_ins_total", "kv_cache_used_pages", "kv_swap_used_bytes")]
        dropped = counter(url, "evictions_total", kind="dropped")
    assert got == want
    assert len(set(want)) > 20, "an answer of few tokens proves nothing"
    assert (figures, dropped) == ([2, 0, 0], 0)
