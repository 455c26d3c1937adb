"""Adapters through a real server: the text equals transformers' with PEFT, whoever else is in the pass."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from live_server import free_port, live_server, start_server
from peft_oracle import ALL, base_model, greedy, load_peft, write_random_adapter

from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings

PROMPT = [1, 9, 77, 4, 200, 31, 5]
TOKENS = 40


def settings(url: str, home: Path, **changed: object) -> EdgeSettings:
    fixed = {"server": url, "noise": "0", "codec": "fp32", "threads": 1, "allow_embedding_states": True}
    return EdgeSettings(**{**fixed, "cache_dir": home / "cache", "state_dir": home / "state", **changed})  # type: ignore[arg-type]


async def generate(edge: EdgeRuntime, prompt: list[int] = PROMPT, count: int = TOKENS) -> list[int]:
    params = edge.params(max_new_tokens=count, ignore_eos=True, temperature=0.0, repetition_penalty=1.0)
    async with edge.open() as session:
        turn = edge.turn(prompt, params)
        async for _ in session.generate(prompt, turn):
            pass
        return turn.tokens


def text(url: str, home: Path, **changed: object) -> list[int]:
    async def once() -> list[int]:
        async with EdgeRuntime.connect(settings(url, home, **changed)) as edge:
            return await generate(edge)

    return asyncio.run(once())


def oracle(base: Path, adapter: Path, count: int = TOKENS) -> list[int]:
    found = greedy(load_peft(base, adapter), PROMPT, count)
    assert len(set(found)) > 9, "text that repeats itself proves nothing"
    return found


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_the_text_is_transformers_with_peft_in_every_partition(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    base = tiny_checkpoint(family=family)
    adapter = write_random_adapter(tmp_path / "adapter", base, r=3, target_modules=list(ALL), use_rslora=True)
    want = oracle(base, adapter)
    assert want != greedy(base_model(base), PROMPT, TOKENS)
    with live_server(base, "--allowed-partitions", "0,0", "--lora-modules", f"tuned={adapter}") as url:
        for partition in ("0,0", "1,1", "0,3"):
            assert text(url, tmp_path, adapter="tuned", partition=partition) == want, partition
        assert text(url, tmp_path, adapter=f"tuned={adapter}", partition="1,2") == want


def test_sessions_with_other_adapters_and_none_share_passes(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(layers=5)
    first = write_random_adapter(tmp_path / "first", base, seed=1, r=2)
    second = write_random_adapter(
        tmp_path / "second", base, seed=2, r=5, alpha=3, target_modules=["v_proj", "down_proj"]
    )
    wants = [oracle(base, first), oracle(base, second), greedy(base_model(base), PROMPT, TOKENS)]
    assert len({tuple(want) for want in wants}) == 3

    async def together(url: str) -> list[list[int]]:
        async with contextlib.AsyncExitStack() as stack:
            edges = []
            for adapter, partition in (("one", "1,1"), ("two", "2,1"), (None, "1,1")):
                made = EdgeRuntime.connect(
                    settings(url, tmp_path, adapter=adapter, partition=partition), max_sessions=3
                )
                edges.append(await stack.enter_async_context(made))
            return await asyncio.gather(*(generate(edge) for edge in edges * 3))

    modules = ["--lora-modules", f"one={first}", "--lora-modules", f"two={second}"]
    with live_server(base, *modules) as url:
        texts = asyncio.run(together(url))
    assert texts == wants * 3


def test_forks_and_a_restart_keep_the_adapter(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    adapter = write_random_adapter(tmp_path / "adapter", base)
    model = load_peft(base, adapter)
    begun = [*PROMPT, *range(20, 60)]
    first = greedy(model, begun, 20)
    # One goes on from the answer; the other from its middle, which is a fork of pages that both share.
    longer, other = [*begun, *first, 88], [*begun, *first[:10], 7]
    wants = [first, greedy(model, longer, 20), greedy(model, other, 20)]
    after = [*longer, *wants[1], 9]
    wants.append(greedy(model, after, 20))
    port, flags = free_port(), ("--lora-modules", f"tuned={adapter}")

    async def talk(stack: contextlib.ExitStack) -> tuple[list[list[int]], list[int]]:
        process = start_server(base, port, *flags)
        stack.callback(process.wait)
        stack.callback(process.kill)
        chosen = settings(f"http://127.0.0.1:{port}", tmp_path, adapter="tuned")
        async with EdgeRuntime.connect(chosen, max_sessions=4) as edge:
            said = [await converse(edge, prompt) for prompt in (begun, longer, other)]
            process.kill()
            process.wait()
            again = await asyncio.to_thread(start_server, base, port, *flags)
            stack.callback(again.wait)
            stack.callback(again.terminate)
            # The server has lost everything: the edge replays its rows, and the session names its adapter again.
            said.append(await converse(edge, after))
        return [tokens for tokens, _ in said], [cached for _, cached in said]

    with contextlib.ExitStack() as stack:
        texts, cached = asyncio.run(talk(stack))
    assert texts == wants
    assert cached == [0, len(begun) + 19, len(begun) + 10, len(longer) + 19]


async def converse(edge: EdgeRuntime, prompt: list[int]) -> tuple[list[int], int]:
    """The answer, and how many tokens an earlier conversation spared."""
    params = edge.params(max_new_tokens=20, ignore_eos=True, temperature=0.0, repetition_penalty=1.0)
    turn = edge.turn(prompt, params)
    async with edge.conversations.session(prompt) as session:
        async for _ in session.generate(prompt, turn):
            pass
        return turn.tokens, session.stats.cached_tokens
