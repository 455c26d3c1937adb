"""What the server costs besides the model: one-token steps per second through one process on one core.

    python -m benchmarks.control_plane [--seconds 3 --rounds 3 --cores 0,1]

The server is the real one (uvicorn, WebSocket over loopback, sessions, scheduler, engine loop, pages, metrics), but its
`Passes` take no device time: they check the payloads and answer with the same bytes. Beside it runs a bare WebSocket
echo under the same uvicorn; the rounds alternate, so that a machine whose speed drifts hurts both alike. Every server
gets the first core, and the load generator the second. `per_cpu_second` counts the server's own CPU time only: it holds
on a busy machine too.

At the end passes are given a length, to see how busy they would keep a device with one pass unfinished, and with two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import uvicorn

from benchmarks.common import free_port, record, spread, write_random_model
from benchmarks.frame_load import Load, measure
from serving.core import Core
from serving.hosted import load_hosted
from serving.keys import KeyRing
from serving.passes import Outcome
from serving.run import listen, make_config
from serving.settings import ServerSettings
from serving.steps import Step
from split_llama.engine.plan import BatchPlan
from split_llama.errors import FlLlamaError, NonFiniteStates
from split_llama.wire.codec import Codec, finite_rows, row_bytes

WIDTH = 4096
POSITIONS = 4096
# Blocks so narrow that they take no memory: nothing is ever computed in them.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 16,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PASS_MILLISECONDS = (5, 15)
# Sessions, connections that carry them, steps that each session keeps in flight.
SETTINGS = (
    Load(1, 1, 1),
    Load(64, 1, 1),
    Load(64, 8, 1),
    Load(64, 64, 1),
    Load(256, 1, 1),
    Load(256, 8, 1),
    Load(256, 256, 1),
    Load(64, 4, 4),
)


@dataclass(frozen=True)
class _Copied:
    steps: Sequence[Step]
    rows: np.ndarray
    errors: Sequence[FlLlamaError | None]


@dataclass(frozen=True)
class _Running:
    staged: _Copied
    kept: Sequence[int]
    until: float


class NoDevice:
    """Passes without a device: payloads are copied and checked as for one, replies are the same bytes.

    Each pass occupies a device that is not there for `seconds`, one after the other.
    """

    def __init__(self, depth: int, seconds: float) -> None:
        self.depth = depth
        self._seconds = seconds
        self._busy_until = 0.0

    def stage(self, steps: Sequence[Step]) -> _Copied:
        """Copy the rows of one-row steps back to back and check them."""
        rows = np.frombuffer(b"".join([step.rows for step in steps]), np.uint8).reshape(len(steps), -1)
        good = finite_rows(Codec.FP16, rows, WIDTH)
        if good.all():
            return _Copied(steps, rows, [None] * len(steps))
        return _Copied(steps, rows, [None if fine else NonFiniteStates("NaN or infinity") for fine in good])

    def start(self, plan: BatchPlan, staged: _Copied, kept: Sequence[int]) -> _Running:
        """Take note of what is to be answered, and when."""
        self._busy_until = max(time.monotonic(), self._busy_until) + self._seconds
        return _Running(staged, kept, self._busy_until)

    def finish(self, running: _Running) -> Outcome:
        """Answer each step with its own rows."""
        if self._seconds:
            time.sleep(max(0.0, running.until - time.monotonic()))
        steps, rows = running.staged.steps, running.staged.rows
        return Outcome(tuple(steps[index].reply(rows[index].tobytes()) for index in running.kept), self._seconds)


async def echo(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    """A bare ASGI application: every message goes back as it came. Any path of plain HTTP says that it is ready."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message["bytes"]})


def serve_echo(port: int, core: int) -> None:
    """Run the echo on one core, under the server's own configuration of uvicorn."""
    os.sched_setaffinity(0, {core})
    config = make_config(Core(ServerSettings(), KeyRing()))
    config.loaded_app = echo
    _serve(config, ServerSettings(port=port))


def serve_steps(port: int, core: int, folder: Path, depth: int, seconds: float = 0.0) -> None:
    """Run the server on one core, with passes of so many seconds."""
    os.sched_setaffinity(0, {core})
    settings = ServerSettings(
        model=str(folder), port=port, device="cpu", max_num_seqs=256, max_num_batched_tokens=2048, max_sessions=256
    )
    split = Core(settings, KeyRing())
    _serve(make_config(split), settings, lambda: split.serve(load_hosted(settings, folder), NoDevice(depth, seconds)))


def _serve(config: uvicorn.Config, settings: ServerSettings, begin: Callable[[], None] = lambda: None) -> None:
    async def run() -> None:
        begin()
        await uvicorn.Server(config).serve(sockets=[bound])

    with listen(settings) as bound, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


@contextlib.contextmanager
def running(serve: Callable[..., None], core: int, *arguments: object) -> Iterator[tuple[int, psutil.Process]]:
    """Run a server in a process of its own; give its port, and the process to read CPU time from."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, core, *arguments))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                    break
            if not process.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not come up")
            time.sleep(0.05)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join(timeout=30)


def compare(servers: dict[str, tuple[int, psutil.Process]], load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the servers under one load; give the figures of each, and their ratio to the echo."""
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for _ in range(options.rounds):
        for name, (port, process) in servers.items():
            rates[name].append(measure(port, process, load, WIDTH, POSITIONS, options.seconds, echoed=name == "echo"))
    figures: dict[str, Any] = asdict(load)
    for name, rounds in rates.items():
        figures[name] = {key: spread([figure[key] for figure in rounds]) for key in rounds[0]}
    for name in servers:
        if name != "echo":
            for key in ("steps_per_second", "per_cpu_second"):
                ratios = [own[key] / bare[key] for own, bare in zip(rates[name], rates["echo"], strict=True)]
                figures[name][f"{key}_of_echo"] = spread(ratios)
    shown = {name: {key: round(value["median"], 2) for key, value in figures[name].items()} for name in servers}
    print(load, *shown.items(), sep="\n  ", flush=True)
    return figures


def occupy(folder: Path, core: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Give passes a length; say how busy the device would be with one pass and with two unfinished at a time."""
    load, rows = Load(64, 8, 1), []
    for milliseconds in PASS_MILLISECONDS:
        for depth in (1, 2):
            with running(serve_steps, core, folder, depth, milliseconds / 1000) as (port, process):
                figures = measure(port, process, load, WIDTH, POSITIONS, options.seconds, echoed=False)
                batch = _mean_batch(port)
            row = {"pass_ms": milliseconds, "depth": depth, "steps_per_second": figures["steps_per_second"]}
            row |= {"mean_batch": batch, "device_busy": row["steps_per_second"] / batch * milliseconds / 1000}
            print(row, flush=True)
            rows.append(row)
    return rows


def _mean_batch(port: int) -> float:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text.splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("fl_llama_batch_rows_")}
    return values["fl_llama_batch_rows_sum"] / values["fl_llama_batch_rows_count"]


def main() -> None:
    """Measure all settings and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", default="0,1", help="the server's core, and the load generator's")
    parser.add_argument("--only", help="numbers of some settings, with commas")
    parser.add_argument("--name", default="control_plane", help="name of the file of results")
    options = parser.parse_args()
    server_core, load_core = (int(core) for core in options.cores.split(","))
    os.sched_setaffinity(0, {load_core})
    with contextlib.ExitStack() as stack:
        folder = write_random_model(Path(stack.enter_context(tempfile.TemporaryDirectory())), MODEL)
        servers = {
            "echo": stack.enter_context(running(serve_echo, server_core)),
            "server": stack.enter_context(running(serve_steps, server_core, folder, 1)),
            "server_depth_2": stack.enter_context(running(serve_steps, server_core, folder, 2)),
        }
        chosen = range(len(SETTINGS)) if options.only is None else map(int, options.only.split(","))
        settings = [compare(servers, SETTINGS[number], options) for number in chosen]
        occupied = occupy(folder, server_core, options)
    figures = {"width": WIDTH, "codec": "fp16", "row_bytes": row_bytes(Codec.FP16, WIDTH)}
    record(
        options.name, figures | {"uvloop": find_spec("uvloop") is not None, "settings": settings, "occupied": occupied}
    )


if __name__ == "__main__":
    main()
