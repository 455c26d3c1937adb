"""Decode speed: the split over loopback with 1, 4 and 16 sessions against transformers' `generate`, in one run.

    python -m benchmarks.split_decode [--threads 1 --tokens 64 --prompt 16 --rounds 3 --codec fp16 --noise 0]

Server and edge are two processes with `--threads` CPU threads each, one pair for each type of weights; transformers
runs the whole model alone with as many, in float32 and bfloat16. The rounds alternate, so that a machine whose speed
drifts hurts all alike. Random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common import MODEL_134M, record, running_server, spread, write_random_model
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings

SESSIONS = (1, 4, 16)
WHOLE = ("float32", "bfloat16")


@dataclass(frozen=True)
class Weights:
    """How both parties hold their weights."""

    name: str
    flags: Mapping[str, str]


WEIGHTS = (
    Weights("float32", {"dtype": "float32"}),
    Weights("bfloat16", {"dtype": "bfloat16"}),
    Weights("float16", {"dtype": "float16"}),
    Weights("int8", {"dtype": "float32", "quantization": "int8"}),
)


def prompt_ids(length: int, seed: int) -> list[int]:
    """Random token ids that begin with BOS."""
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(3, 32000, (length - 1,), generator=generator).tolist()]


class Whole:
    """The whole model in transformers."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def tokens_per_second(self, prompt: int, tokens: int) -> float:
        """Greedy decoding of one sequence, prompt included in the time as for the split."""
        ids = torch.tensor([prompt_ids(prompt, 0)])
        begin = time.perf_counter()
        self._model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return tokens / (time.perf_counter() - begin)


async def one_answer(edge: EdgeRuntime, prompt: int, tokens: int, seed: int) -> list[float]:
    """Generate one answer; give its inter-token latencies in ms."""
    ids = prompt_ids(prompt, seed)
    async with edge.open() as session:
        turn = edge.turn(ids, edge.params(max_new_tokens=tokens, ignore_eos=True, temperature=0.0))
        async for _ in session.generate(ids, turn):
            pass
        return session.stats.itl_ms


async def split_rate(edge: EdgeRuntime, sessions: int, prompt: int, tokens: int) -> tuple[float, list[float]]:
    """Run `sessions` answers at once; give tokens per second in total, and all latencies."""
    begin = time.perf_counter()
    latencies = await asyncio.gather(*(one_answer(edge, prompt, tokens, seed) for seed in range(sessions)))
    return sessions * tokens / (time.perf_counter() - begin), [ms for one in latencies for ms in one]


@dataclass(frozen=True)
class Overhead:
    """The server's histogram of time outside the model per step: counts by upper bound in seconds, and their sum."""

    counts: dict[float, float]
    seconds: float

    @classmethod
    def read(cls, url: str) -> Overhead:
        """Read it off the server's metrics."""
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        samples = [s for f in families if f.name == "fl_llama_server_overhead_seconds" for s in f.samples]
        counts = {float(s.labels["le"]): s.value for s in samples if s.name.endswith("_bucket")}
        return cls(counts, next(s.value for s in samples if s.name.endswith("_sum")))

    def since(self, before: Overhead) -> dict[str, float]:
        """Give mean and percentiles of the steps since `before`, in ms; a percentile is its bucket's upper bound."""
        counts = {bound: count - before.counts[bound] for bound, count in self.counts.items()}
        steps = max(counts.values())
        shares = {
            f"p{share}_below_ms": 1000 * next(b for b, c in counts.items() if c >= steps * share / 100)
            for share in (50, 99)
        }
        return {"steps": steps, "mean_ms": 1000 * (self.seconds - before.seconds) / steps} | shares


class Runs:
    """Figures of all rounds, by name."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        self.latencies: dict[str, dict[str, float]] = {}
        self.outside: dict[str, dict[str, float]] = {}

    async def split(self, name: str, edge: EdgeRuntime, url: str, options: argparse.Namespace) -> None:
        """Measure one pair of server and edge at every number of sessions."""
        for sessions in SESSIONS:
            before = await asyncio.to_thread(Overhead.read, url)
            rate, itl = await split_rate(edge, sessions, options.prompt, options.tokens)
            key = f"{name}_{sessions}"
            self.outside[key] = (await asyncio.to_thread(Overhead.read, url)).since(before)
            self.rates.setdefault(key, []).append(rate)
            self.latencies[key] = spread(itl)

    def whole(self, dtype: str, model: Whole, options: argparse.Namespace) -> None:
        """Measure transformers."""
        rate = model.tokens_per_second(options.prompt, options.tokens)
        self.rates.setdefault(f"transformers_{dtype}", []).append(rate)

    def report(self) -> dict[str, Any]:
        """Give everything for the record."""
        return {
            "tokens_per_second": {name: spread(values) for name, values in self.rates.items()},
            "inter_token_ms_last_round": self.latencies,
            "server_outside_model_last_round": self.outside,
        }


async def measure(folder: Path, urls: Mapping[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Alternate transformers and every pair of the split for `rounds` rounds."""
    wholes = {dtype: Whole(folder, dtype) for dtype in WHOLE}
    runs = Runs()
    async with contextlib.AsyncExitStack() as stack:
        edges = {}
        for weights in WEIGHTS:
            settings = EdgeSettings(
                server=urls[weights.name],
                model=str(folder),
                noise=options.noise,
                speculate="off",
                codec=options.codec,
                threads=options.threads,
                **weights.flags,  # type: ignore[arg-type]
            )
            edge = await stack.enter_async_context(EdgeRuntime.connect(settings, max_sessions=max(SESSIONS)))
            edges[weights.name] = edge
            await split_rate(edge, 2, options.prompt, 8)
        torch.set_num_threads(options.threads)
        for model in wholes.values():
            model.tokens_per_second(options.prompt, 8)
        for _ in range(options.rounds):
            gc.collect()
            for dtype, model in wholes.items():
                runs.whole(dtype, model, options)
            for name, edge in edges.items():
                await runs.split(name, edge, urls[name], options)
            print({name: round(values[-1], 1) for name, values in runs.rates.items()}, flush=True)
    return runs.report()


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--noise", default="0")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        folder = write_random_model(Path(temporary) / "model", MODEL_134M)
        urls = {}
        for weights in WEIGHTS:
            flags = [part for name, value in weights.flags.items() for part in (f"--{name}", value)]
            server = running_server(folder, "--threads", str(options.threads), *flags)
            urls[weights.name] = stack.enter_context(server)
        figures = asyncio.run(measure(folder, urls, options))
    record("split_decode", {"options": vars(options)} | figures)


if __name__ == "__main__":
    main()
