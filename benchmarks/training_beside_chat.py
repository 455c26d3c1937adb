"""A chat and a fine-tuning job on one server: what each does to the other.

    python -m benchmarks.training_beside_chat [default] [small] [sweep] [unpinned] [--rounds 3] [--tokens 160]

A server with one thread, pinned to the first core, has a random model of 134M parameters (float32, partition 1,1). On
the other core are the chat's edge (one thread, greedy, no guesses, fp16 on the wire), the link and the job's clients.
These compute A and C on computers of their own, which are emulated: they sleep for what those take here (`ENDS`).
So chat and job share nothing but the server and a core's share of event loops. The job: server-hierarchical, 2 clients
with micro-batches of 2 samples of 64 tokens, 2 of them under way. It is paused and resumed in turns, so that both
sides of each comparison lie next to each other.

default   the default share and quantum, without a link and over 20 ms
small     the same with a model of 16M parameters, whose tokens are faster
sweep     shares, quanta and smaller passes, without a link
unpinned  the default, clients computing for real, everything on both cores as the system likes
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import MODEL_134M, record
from benchmarks.training_common import MODEL_16M, DeviceTimes, Job, Seconds, prepared_model, training_server
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from loadtest.proxy_process import proxy_process
from training.job_config import JobConfig

TRIP_MS = 20
ROWS = 64
SERVER_CORE, OTHER_CORE = "0", "1"
# Of two samples of 64 tokens, measured on this machine with one thread (`training_party parts`).
ENDS = DeviceTimes(Seconds(0, 0), Seconds(0, 0), Seconds(0.030, 0.0), Seconds(0.150, 0.0), Seconds(0.030, 0.0))
# Share, quantum in ms, the job's clients, samples in a micro-batch of each: rows in a pass are what a block takes.
SWEEP = ((0.5, 20.0, 2, 1), (0.5, 20.0, 1, 1), (0.5, 5.0, 1, 1), (0.25, 20.0, 1, 1), (0.25, 20.0, 2, 2))


def job_config(clients: int = 2, batch_size: int = 2) -> JobConfig:
    """Give the job."""
    return JobConfig.parse(
        {
            "name": "beside-chat",
            "strategy": "server-hierarchical",
            "clients": clients,
            "steps": 100_000,
            "batch_size": batch_size,
            "accumulate": 4,
            "max_micros": 2,
            "average_every": 100,
            "checkpoint_every": 100_000,
        }
    )


SETTLE_SECONDS = 2.0
ALONE_SECONDS = 6.0


def percentile(values: Sequence[float], share: float) -> float:
    """Give the value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class RunningJob:
    """A job without end: paused and resumed, and its speed over a while."""

    def __init__(self, server: str, job: Job, folder: Path, clients: list[subprocess.Popen[bytes]]) -> None:
        self._server = server
        self._job = job
        self._folder = folder
        self._clients = clients

    def order(self, what: str) -> None:
        """Pause or resume it."""
        path = f"{self._server}/v1/jobs/{self._job.key.id}/{what}"
        httpx.post(path, headers={"X-FL-Job-Key": self._job.key.key}, trust_env=False).raise_for_status()

    def samples(self) -> int:
        """Count the samples of all closed steps."""
        logs = self._folder.glob("client-*/log.jsonl")
        steps = sum(len(log.read_text().splitlines()) for log in logs)
        return steps * self._job.config.batch_size * self._job.config.accumulate

    async def wait_until_it_runs(self) -> None:
        """Wait for the first steps of all clients."""
        deadline = time.monotonic() + 60
        config = self._job.config
        while self.samples() < 2 * config.clients * config.batch_size * config.accumulate:
            if time.monotonic() > deadline or any(client.poll() is not None for client in self._clients):
                said = [file.read_text()[-500:] for file in self._folder.glob("*.err")]
                raise RuntimeError(f"the job does not run; its clients say {said}")
            await asyncio.sleep(0.1)

    def busy_share(self, before: tuple[float, float]) -> float:
        """Give the share of time that background work computed since `before`."""
        now, seconds = self.background()
        return (seconds - before[1]) / (now - before[0])

    def background(self) -> tuple[float, float]:
        """Give the time, and the seconds that background work has computed."""
        text = httpx.get(f"{self._server}/metrics", trust_env=False).text
        line = next(line for line in text.splitlines() if line.startswith("fl_llama_background_seconds "))
        return time.monotonic(), float(line.split()[1])


@contextlib.contextmanager
def running_job(
    server: str, url: str, model: Path, config: JobConfig, ends: DeviceTimes | None, core: str | None
) -> Iterator[RunningJob]:
    """Run a job's clients for a block."""
    with tempfile.TemporaryDirectory(prefix="fl-llama-clients-") as temporary:
        folder = Path(temporary) / "out"
        job = Job(server, config)
        with job.clients(url, model, folder, ROWS, ends, core) as clients:
            yield RunningJob(server, job, folder, clients)
            job.cancel()


@contextlib.asynccontextmanager
async def chat_edge(url: str, model: Path) -> AsyncIterator[EdgeRuntime]:
    """Connect the chat's edge."""
    settings = EdgeSettings(server=url, model=str(model), noise="0", codec="fp16", threads=1, speculate="off")
    async with EdgeRuntime.connect(settings) as edge:
        yield edge


async def token_times(edge: EdgeRuntime, tokens: int, seed: int) -> list[float]:
    """Generate; give the milliseconds between tokens."""
    ids = [1, *((31 * place + 7 * seed) % 2000 + 3 for place in range(15))]
    turn = edge.turn(ids, edge.params(max_new_tokens=tokens, ignore_eos=True, temperature=0.0))
    async with edge.open() as session:
        async for _ in session.generate(ids, turn):
            pass
        return list(session.stats.itl_ms)


async def side_by_side(edges: dict[str, EdgeRuntime], job: RunningJob, options: argparse.Namespace) -> dict[str, Any]:
    """Take turns: the chat by itself, both, the job by itself."""
    alone: dict[str, list[float]] = {name: [] for name in edges}
    beside: dict[str, list[float]] = {name: [] for name in edges}
    work: dict[str, list[float]] = {"alone": [], **{name: [] for name in edges}}
    await job.wait_until_it_runs()
    for turn in range(options.rounds):
        job.order("pause")
        await asyncio.sleep(SETTLE_SECONDS)
        for name, edge in edges.items():
            alone[name] += await token_times(edge, options.tokens, turn)
        job.order("resume")
        await asyncio.sleep(SETTLE_SECONDS)
        before = job.background()
        await asyncio.sleep(ALONE_SECONDS)
        work["alone"].append(job.busy_share(before))
        for name, edge in edges.items():
            before = job.background()
            beside[name] += await token_times(edge, options.tokens, turn)
            work[name].append(job.busy_share(before))
    figures: dict[str, Any] = {"job_share_alone": sum(work["alone"]) / len(work["alone"])}
    for name in edges:
        figures[name] = judged(alone[name], beside[name]) | {"job_share": sum(work[name]) / len(work[name])}
        print(name, {key: round(value, 2) for key, value in figures[name].items()}, flush=True)
    return figures


def judged(alone: Sequence[float], beside: Sequence[float]) -> dict[str, float]:
    """Compare times between tokens, in ms."""
    figures: dict[str, float] = {"tokens": len(beside)}
    for share in (0.5, 0.99):
        name = f"p{100 * share:.0f}"
        figures |= {f"alone_{name}": percentile(alone, share), f"beside_{name}": percentile(beside, share)}
        figures[f"ratio_{name}"] = figures[f"beside_{name}"] / figures[f"alone_{name}"]
    return figures


async def one_setting(
    model: Path,
    flags: Sequence[str],
    options: argparse.Namespace,
    config: JobConfig,
    *,
    links: bool = False,
    pinned: bool = True,
) -> dict[str, Any]:
    """Start a server with these flags, a job, and edges; measure."""
    core, other = (SERVER_CORE, OTHER_CORE) if pinned else (None, None)
    os.sched_setaffinity(0, {int(OTHER_CORE)} if pinned else set(range(os.cpu_count() or 1)))
    async with contextlib.AsyncExitStack() as stack:
        server, _ = stack.enter_context(training_server(model, *flags, cpu=core))
        url = stack.enter_context(proxy_process(server, "--rtt", str(TRIP_MS)))
        edges = {"no link": await stack.enter_async_context(chat_edge(server, model))}
        if links:
            edges[f"{TRIP_MS} ms"] = await stack.enter_async_context(chat_edge(url, model))
        job = stack.enter_context(running_job(server, url, model, config, ENDS if pinned else None, other))
        return await side_by_side(edges, job, options)


async def default(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the default share and quantum."""
    return await one_setting(model, (), options, job_config(), links=True)


async def small(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the default with a smaller model."""
    with prepared_model(MODEL_16M) as other:
        return await one_setting(other, (), options, job_config(), links=True)


async def unpinned(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure with everything on both cores."""
    return await one_setting(model, (), options, job_config(), links=True, pinned=False)


async def sweep(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure shares and quanta."""
    figures = {}
    for share, quantum, clients, batch in SWEEP:
        flags = ("--background-share", str(share), "--background-quantum", str(quantum))
        name = f"share {share:g}, quantum {quantum:g} ms, {clients} x {batch} samples"
        print(name, flush=True)
        figures[name] = await one_setting(model, flags, options, job_config(clients, batch))
    return figures


SECTIONS = {"default": default, "small": small, "sweep": sweep, "unpinned": unpinned}


def main() -> None:
    """Run the sections asked for; each is recorded by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    options = parser.parse_args()
    with prepared_model(MODEL_134M) as model:
        for name in options.sections or SECTIONS:
            figures = asyncio.run(SECTIONS[name](model, options))
            job = job_config().model_dump(include={"strategy", "clients", "batch_size", "accumulate", "max_micros"})
            record(f"training_beside_chat-{name}", {"job": job, "rows": ROWS, "tokens": options.tokens, name: figures})


if __name__ == "__main__":
    main()
