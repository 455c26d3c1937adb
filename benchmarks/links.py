"""The edge over slow links, emulated on this machine: speculation, overhead per step, prefill, parallel chats.

    python -m benchmarks.links [speculation] [step] [prefill] [parallel] [--models demo ...] [--rounds 3] [--states DIR]

Server, proxy and edge are processes of their own, server and edge with one CPU thread each. What is compared alternates
within each round.

speculation  trained models at round trips of 20 and 80 ms: without guesses, with prompt lookup, with the learned head,
             with both, and with guesses that are always wrong; held-out stories for `demo` (see
             `benchmarks.speculation`), the beginnings of its own samples for any other model, whose head
             `edge-client train-drafter --state-dir DIR` has made
step         134M random parameters, float32, float16 and int8, with no link and at 20 ms: what a step costs beside the
             round trip and both parties' compute
prefill      2,048 tokens over 50 Mbit/s and 20 ms, against transfer, the edge's and the server's compute
parallel     1 and 16 chats at once through one gateway at 20 ms: tokens per second, fairness, connections
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common import MODEL_134M, free_port, record, running_server, spread, write_random_model
from benchmarks.speculation import WholeModel, demo_prompts, own_samples
from benchmarks.split_decode import prompt_ids
from edge_client.generate import GenerationStats
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from edge_client.speculation.drafter import DraftRequest, Guesses
from loadtest.proxy_process import proxy_process
from split_llama.checkpoint import Checkpoint

ROUND_TRIPS_MS = (20, 80)
STEP_ROUND_TRIP_MS = 20
PREFILL_TOKENS = 2048
PREFILL_MBIT = 50
CHATS = 16
MODES: dict[str, dict[str, str]] = {
    "off": {"speculate": "off"},
    "lookup": {"speculate": "auto", "drafter": "lookup"},
    "head": {"speculate": "auto", "drafter": "head"},
    "both": {"speculate": "auto", "drafter": "auto"},
    "wrong": {"speculate": "auto", "drafter": "benchmarks.links:Wrong"},
}
WEIGHTS = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
}


class Wrong:
    """A drafter that is sure of itself and always wrong: no model here ever says token 0."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Nothing to learn from a model."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        """Guess token 0 again and again."""
        return [self._chain(min(4, request.max_guesses)) for request in requests]

    def _chain(self, length: int) -> Guesses:
        return Guesses((0,) * length, tuple(range(-1, length - 1)), tuple(0.8**depth for depth in range(1, length + 1)))


async def answer(edge: EdgeRuntime, ids: Sequence[int], count: int, *, to_the_end: bool = False) -> GenerationStats:
    """Generate greedily, in a session of its own."""
    turn = edge.turn(ids, edge.params(max_new_tokens=count, ignore_eos=not to_the_end, temperature=0.0))
    async with edge.open() as session:
        async for _ in session.generate(ids, turn):
            pass
        return session.stats


@contextlib.asynccontextmanager
async def edge_for(url: str, **changes: Any) -> AsyncIterator[EdgeRuntime]:
    """Connect an edge with one thread, fp16 on the wire and no noise."""
    settings = EdgeSettings(server=url, noise="0", codec="fp16", threads=1, **changes)
    async with EdgeRuntime.connect(settings) as edge:
        yield edge


# -- speculation


def held_out(model: str, count: int) -> list[list[int]]:
    """Give prompts that no head was trained on."""
    whole = WholeModel(model)
    if model == "demo":
        return demo_prompts(whole, count)["stories"]
    return [text.tokens[:24] for text in own_samples(whole, count, seed=900_000)]


def rates(stats: Sequence[GenerationStats]) -> dict[str, float]:
    """Sum several answers up. The prompt's own round trip and the first token are left out."""
    tokens = sum(len(one.itl_ms) for one in stats)
    seconds = sum(sum(one.itl_ms) for one in stats) / 1000
    trips = sum(one.round_trips - 1 for one in stats)
    drafted, accepted = sum(one.drafted for one in stats), sum(one.accepted for one in stats)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tokens_per_round_trip": tokens / trips,
        "guesses_per_round_trip": drafted / trips,
        "accepted_share": accepted / drafted if drafted else 0.0,
    }


async def speculation(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every model, round trip and mode."""
    figures: dict[str, Any] = {}
    for model in options.models:
        prompts = held_out(model, options.prompts)
        with running_server(model, "--threads", "1") as server:
            for trip in ROUND_TRIPS_MS:
                with proxy_process(server, "--rtt", str(trip)) as url:
                    key = f"{Path(model).name}_{trip}ms"
                    figures[key] = await _modes(url, prompts, options)
                    for mode, found in figures[key].items():
                        print(key, mode, {name: round(value, 2) for name, value in found.items()}, flush=True)
    return figures


async def _modes(url: str, prompts: Sequence[Sequence[int]], options: argparse.Namespace) -> dict[str, Any]:
    stats: dict[str, list[GenerationStats]] = {mode: [] for mode in MODES}
    async with contextlib.AsyncExitStack() as stack:
        edges = {}
        for mode, changes in MODES.items():
            edges[mode] = await stack.enter_async_context(edge_for(url, state_dir=options.states, **changes))
        for ids in prompts:
            for mode, edge in edges.items():
                stats[mode].append(await answer(edge, ids, options.tokens, to_the_end=True))
    return {mode: rates(found) for mode, found in stats.items()}


# -- step


@dataclass(frozen=True)
class ServerTime:
    """What the server's metrics say about its passes so far: how many, and their seconds."""

    passes: float
    seconds: float

    @classmethod
    async def read(cls, url: str) -> ServerTime:
        """Read it off the metrics, beside the link."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"{url}/metrics")).text
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if family.name == "fl_llama_model_pass_seconds" and "le" not in sample.labels
        }
        return cls(values["fl_llama_model_pass_seconds_count"], values["fl_llama_model_pass_seconds_sum"])


def edge_seconds(edge: EdgeRuntime) -> dict[str, float]:
    """Seconds that the edge has computed so far, by phase."""
    times = edge.times
    return {"a": times.a, "c": times.c, "head": times.head, "choose": times.choose, "codec": times.codec}


async def one_step_run(edge: EdgeRuntime, server: str, trip: float, options: argparse.Namespace) -> dict[str, float]:
    """Decode without guesses; give what a step takes, all in milliseconds."""
    ids = prompt_ids(16, 0)
    await answer(edge, ids, 4)
    before, here = await ServerTime.read(server), edge_seconds(edge)
    stats = await answer(edge, ids, options.tokens)
    after, there = await ServerTime.read(server), edge_seconds(edge)
    steps = stats.round_trips
    edge_ms = sum(there[name] - here[name] for name in here) * 1000 / steps
    server_ms = (after.seconds - before.seconds) * 1000 / (after.passes - before.passes)
    step_ms = spread(stats.itl_ms)["median"]
    return {
        "tokens_per_second": 1000 / (sum(stats.itl_ms) / len(stats.itl_ms)),
        "step_ms": step_ms,
        "edge_ms": edge_ms,
        "server_ms": server_ms,
        "overhead_ms": step_ms - trip - edge_ms - server_ms,
    }


async def step(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all weights with and without the link, in alternating rounds."""
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as processes:
        folder = write_random_model(Path(temporary) / "model", MODEL_134M)
        async with contextlib.AsyncExitStack() as stack:
            runs = []
            for name, flags in WEIGHTS.items():
                words = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
                server = processes.enter_context(running_server(folder, "--threads", "1", *words))
                slow = processes.enter_context(proxy_process(server, "--rtt", str(STEP_ROUND_TRIP_MS)))
                for trip, url in ((0, server), (STEP_ROUND_TRIP_MS, slow)):
                    edge = await stack.enter_async_context(edge_for(url, model=str(folder), speculate="off", **flags))
                    runs.append((f"{name}_{trip}ms", edge, server, trip))
            for _ in range(options.rounds):
                for name, edge, server, trip in runs:
                    figures.setdefault(name, []).append(await one_step_run(edge, server, trip, options))
                    print(name, {key: round(value, 2) for key, value in figures[name][-1].items()}, flush=True)
    return {name: {key: spread([one[key] for one in found]) for key in found[0]} for name, found in figures.items()}


# -- prefill


async def prefill(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the time to the first token of a long prompt, and what bounds it."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_random_model(Path(temporary) / "model", MODEL_134M)
        flags = ("--rtt", "20", "--bandwidth", str(PREFILL_MBIT))
        with (
            running_server(folder, "--threads", "1", "--dtype", "float32") as server,
            proxy_process(server, *flags) as url,
        ):
            async with edge_for(url, model=str(folder)) as edge:
                await answer(edge, prompt_ids(64, 1), 1)
                for seed in range(options.rounds):
                    found.append(await _one_prefill(edge, server, seed))
                    print({key: round(value, 2) for key, value in found[-1].items()}, flush=True)
    return {key: spread([one[key] for one in found]) for key in found[0]}


async def _one_prefill(edge: EdgeRuntime, server: str, seed: int) -> dict[str, float]:
    before, here = await ServerTime.read(server), edge_seconds(edge)
    stats = await answer(edge, prompt_ids(PREFILL_TOKENS, seed), 1)
    after, there = await ServerTime.read(server), edge_seconds(edge)
    transfer = max(stats.bytes_up, stats.bytes_down) * 8 / (PREFILL_MBIT * 1e6) * 1000
    edge_ms = sum(there[name] - here[name] for name in here) * 1000
    server_ms = (after.seconds - before.seconds) * 1000
    bound = max(transfer, edge_ms, server_ms)
    return {
        "first_token_ms": stats.ttft_ms,
        "transfer_ms": transfer,
        "edge_ms": edge_ms,
        "server_ms": server_ms,
        "ratio": stats.ttft_ms / bound,
    }


# -- parallel


@contextlib.contextmanager
def running_gateway(server: str, *flags: str) -> Iterator[str]:
    """Run `edge-client serve` in a process of its own; give its URL."""
    port = free_port()
    command = [sys.executable, "-m", "edge_client", "serve", "--server", server, "--port", str(port)]
    command += ["--threads", "1", "--noise", "0", "--log-level", "warning", *flags]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the gateway did not start")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


async def _one_chat(client: httpx.AsyncClient, seed: int, tokens: int) -> float:
    """Stream one completion; give its seconds."""
    begin, count = time.perf_counter(), 0
    body = {"model": "model", "prompt": prompt_ids(32, seed), "max_tokens": tokens, "ignore_eos": True}
    body |= {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage")
                count = usage["completion_tokens"] if usage else count
    assert count == tokens, f"{count} tokens came"
    return time.perf_counter() - begin


async def parallel(options: argparse.Namespace) -> dict[str, Any]:
    """Measure 1 and `CHATS` chats in alternating rounds; then leave one and see when its pages are free."""
    found: dict[str, list[float]] = {"one": [], "all": [], "slowest_over_fastest": [], "pages_free_after_s": []}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = write_random_model(Path(temporary) / "model", MODEL_134M)
        server = stack.enter_context(running_server(folder, "--threads", "1", "--dtype", "float32"))
        slow = stack.enter_context(proxy_process(server, "--rtt", str(STEP_ROUND_TRIP_MS)))
        url = stack.enter_context(running_gateway(slow, "--speculate", "off", "--model", str(folder)))
        async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
            await _one_chat(client, 999, 4)
            for turn in range(options.rounds):
                found["one"].append(options.tokens / await _one_chat(client, 1000 * turn, options.tokens))
                begin = time.perf_counter()
                seeds = range(1000 * turn + 1, 1000 * turn + 1 + CHATS)
                each = await asyncio.gather(*(_one_chat(client, seed, options.tokens) for seed in seeds))
                found["all"].append(CHATS * options.tokens / (time.perf_counter() - begin))
                found["slowest_over_fastest"].append(max(each) / min(each))
                found["pages_free_after_s"].append(await _leave_early(client, server))
                print({name: round(values[-1], 3) for name, values in found.items()}, flush=True)
            connections = await _metric(server, "fl_llama_connections_opened_total")
    return {name: spread(values) for name, values in found.items()} | {"connections_to_the_server": connections}


async def _leave_early(client: httpx.AsyncClient, server: str) -> float:
    """Begin a chat, leave it after a few tokens; give the seconds until the server has its pages back."""
    before = await _metric(server, "fl_llama_kv_cache_usage_ratio")
    body = {"model": "model", "prompt": prompt_ids(512, 77), "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        for _ in range(8):
            await anext(lines)
    begin = time.perf_counter()
    while await _metric(server, "fl_llama_kv_cache_usage_ratio") > before:
        if time.perf_counter() - begin > 30:
            raise RuntimeError("the pages of a chat that was left are still taken")
    return time.perf_counter() - begin


async def _metric(server: str, name: str) -> float:
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{server}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name)


SECTIONS = {"speculation": speculation, "step": step, "prefill": prefill, "parallel": parallel}


def main() -> None:
    """Run the sections asked for; each is recorded by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--states", type=Path, help="the edge's state folder, with draft heads")
    options = parser.parse_args()
    for name in options.sections or SECTIONS:
        begin = time.perf_counter()
        figures = asyncio.run(SECTIONS[name](options))
        record(f"links-{name}", {"options": {key: str(value) for key, value in vars(options).items()}, name: figures})
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
