"""The runner on LLaMA-2-7B's geometry, 28 blocks of random weights, from payload to reply.

Each figure stands beside what the device must do at least: read the weights, and the KV where it counts, once at the
bandwidth of a copy. The last case is transformers' continuous batching over the same blocks on the same device.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.bandwidth import copy_bandwidth
from benchmarks.kernels.transformers_batching import transformers_batching
from serving.device.graphs import Most
from serving.device.passes import DevicePasses
from serving.device.runner import Runner
from serving.steps import Step
from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.engine import PAGE_SIZE, Engine
from split_llama.engine.sequence import Sequence as KVSequence
from split_llama.layers import RMSNorm, Segment
from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.step import build_step

PASS_ROWS = 2048
# Wide enough to sample from, narrow enough that the head costs transformers nothing.
VOCAB = 320


@dataclass(frozen=True)
class Size:
    """What is measured: blocks of a geometry, sessions, their context, a prompt and new tokens for throughput."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    sessions: int
    context: int
    steps: int
    prompt: int
    new: int
    warm_up_seconds: float


LLAMA_2_7B = Size(4096, 11008, 32, 32, 28, 64, 1024, 32, 512, 128, 40.0)
QUICK = Size(4096, 11008, 32, 32, 28, 64, 1024, 12, 256, 48, 20.0)
# For a CPU with Triton's interpreter: the script runs, the figures mean nothing.
TINY = Size(32, 48, 4, 2, 2, 2, 24, 2, 4, 3, 0.0)


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Time steps, passes, idle time and throughput; a case that fails gives its error and leaves the others be."""
    return list(rows(device, quick))


def rows(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield what `measure` lists, as soon as it is there."""
    size = TINY if device.type != "cuda" else QUICK if quick else LLAMA_2_7B
    cases: dict[str, Callable[[World], dict[str, Any]]] = {
        "one session": one_session,
        "many sessions": many_sessions,
        "idle device": idle_device,
        "throughput": throughput,
    }
    try:
        world = World(device, size, quick)
    except Exception:
        yield row("start", {"error": traceback.format_exc()})
        return
    yield row("start", world.start_figures)
    ours = None
    for name, case in cases.items():
        figures = attempt(name, lambda case=case: case(world))
        ours = figures.get("decode_tokens_per_second")
        yield figures
    world.close()
    work = (size.sessions, size.prompt, size.new)
    yield attempt("transformers", lambda: transformers_batching(device, hf_config(size), *work, ours))


def row(case: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Name a row of figures."""
    return {"kernel": "runner", "case": case} | fields


def attempt(case: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one case; its error takes the place of its figures."""
    try:
        return row(case, work())
    except Exception:
        return row(case, {"error": traceback.format_exc()})


def hf_config(size: Size) -> dict[str, Any]:
    """The geometry as config.json has it."""
    return {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }


def random_segment(size: Size, device: torch.device) -> Segment:
    """All blocks, bfloat16, with random weights that keep states finite."""
    config = ModelConfig.from_hf(hf_config(size))
    segment = Segment(config, BlockRange(0, size.blocks), dtype=torch.bfloat16, device=device)
    for module in segment.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return segment


class World:
    """A runner over random blocks, and sessions whose pages hold random numbers instead of computed ones."""

    def __init__(self, device: torch.device, size: Size, quick: bool) -> None:
        self.device, self.size, self.quick = device, size, quick
        started = time.perf_counter()
        segment = random_segment(size, device)
        self.weights = sum(parameter.nbytes for parameter in segment.parameters())
        longest = max(size.context, size.prompt + size.new) + 8 * size.steps
        pages = (size.sessions + 1) * -(-longest // PAGE_SIZE)
        self.engine = Engine(segment, num_pages=pages, page_size=PAGE_SIZE)
        for cache in (self.engine.cache.k, self.engine.cache.v):
            cache.normal_()
        self.runner = Runner(segment, self.engine.cache, Most(PASS_ROWS, size.sessions))
        made = time.perf_counter()
        self.passes = DevicePasses(self.runner)
        self.passes.warm_up(size.warm_up_seconds)
        self.bandwidth = copy_bandwidth(device, quick)
        assert self.runner.graphs is not None
        self.graphs = self.runner.graphs
        self.start_figures = {
            "blocks": size.blocks,
            "weights_bytes": self.weights,
            "copy_bytes_per_second": self.bandwidth,
            "make_seconds": made - started,
            "warm_up_seconds": time.perf_counter() - made,
            "graphs": len(self.graphs.captured),
        }

    def close(self) -> None:
        """Give the memory back."""
        for name in ("engine", "runner", "passes", "graphs"):
            delattr(self, name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sessions(self, count: int, context: int) -> list[KVSequence]:
        """Open sessions with `context` positions each, none of them computed."""
        opened = [self.engine.sequence(self.engine.blocks, 4096) for _ in range(count)]
        for sequence in opened:
            if context:
                sequence.append(context)
        return opened

    def step(self, count: int) -> Step:
        """A step of random rows; the sessions share it, for nobody looks at the numbers."""
        states = np.random.default_rng(count).standard_normal((count, self.size.hidden)).astype(np.float32)
        rows = encode_rows(Codec.FP16, states)
        frame = build_step(handle=1, seq=1, first=0, count=count, codec=Codec.FP16, rows=rows)
        return Step.from_frame(frame, self.size.hidden, PASS_ROWS, 0.0)

    def start(self, sequences: Sequence[KVSequence], step: Step) -> Any:
        """Start a pass in which each sequence grows by the step."""
        staged = self.passes.stage([step] * len(sequences))
        plan = self.engine.plan([sequence.append(step.count) for sequence in sequences])
        return self.passes.start(plan, staged, range(len(sequences)))

    def run(self, sequences: Sequence[KVSequence], step: Step, passes: int) -> list[tuple[float, float]]:
        """Run passes one after the other, as sessions do that wait for each reply: wall and device seconds of each."""
        seconds = []
        for _ in range(passes):
            began = time.perf_counter()
            outcome = self.passes.finish(self.start(sequences, step))
            seconds.append((time.perf_counter() - began, outcome.model_seconds))
        return seconds

    def run_overlapped(self, sequences: Sequence[KVSequence], step: Step, passes: int) -> float:
        """Run passes two at a time, as a server with queued work does; wall seconds of all."""
        began = time.perf_counter()
        running: list[Any] = []
        for _ in range(passes):
            if len(running) == self.passes.depth:
                self.passes.finish(running.pop(0))
            running.append(self.start(sequences, step))
        for one in running:
            self.passes.finish(one)
        return time.perf_counter() - began

    def replay_seconds(self, times: int) -> float:
        """Seconds of the last pass's graph alone, repeated without the host."""
        began = self.runner.device.mark()
        with torch.inference_mode():
            for _ in range(times):
                self.graphs.repeat()
        ended = self.runner.device.mark()
        ended.wait()
        return ended.seconds_since(began) / times

    def kv_bytes(self, sequences: Sequence[KVSequence]) -> int:
        """Bytes of K and V that a pass over these sequences reads."""
        cache = self.engine.cache
        slot_bytes = 2 * cache.k[:, 0, 0].numel() * cache.k.itemsize
        return sum(sequence.length for sequence in sequences) * slot_bytes


def timed_against_floor(world: World, sequences: Sequence[KVSequence]) -> dict[str, Any]:
    """Time decode passes of these sessions beside reading weights and KV once."""
    step, size = world.step(1), world.size
    # The first passes of a shape run without a graph, then capture it.
    world.run(sequences, step, 3)
    seconds = world.run(sequences, step, size.steps)
    read = world.weights + world.kv_bytes(sequences)
    floor = read / world.bandwidth
    wall, on_device = (statistics.median(column) for column in zip(*seconds, strict=True))
    alone = world.replay_seconds(size.steps)
    return {
        "sessions": len(sequences),
        "context": sequences[0].length,
        "bytes_read_once": read,
        "floor_ms": floor * 1e3,
        "wall_ms": wall * 1e3,
        "device_ms": on_device * 1e3,
        "graph_alone_ms": alone * 1e3,
        "floor_share_of_wall": floor / wall,
        "floor_share_of_device": floor / on_device,
        "floor_share_of_graph": floor / alone,
        "weights_share_of_wall": world.weights / world.bandwidth / wall,
    }


def one_session(world: World) -> dict[str, Any]:
    """One session's step from payload to reply. Target: at least 0.8 of the wall time reads the weights once."""
    sequences = world.sessions(1, world.size.context // 4)
    figures = timed_against_floor(world, sequences)
    free(sequences)
    return figures


def many_sessions(world: World) -> dict[str, Any]:
    """64 sessions at context 1,024. Target: at least 0.75 of the wall time reads weights and KV once."""
    # They end at the context asked for.
    sequences = world.sessions(world.size.sessions, world.size.context - world.size.steps - 3)
    figures = timed_against_floor(world, sequences)
    free(sequences)
    return figures


def idle_device(world: World) -> dict[str, Any]:
    """How much of the time the device has nothing to do while passes are queued two deep. Target: under 0.1."""
    size, step = world.size, world.step(1)
    sequences = world.sessions(size.sessions, size.context - 2 * size.steps - 3)
    world.run(sequences, step, 3)
    wall = world.run_overlapped(sequences, step, 2 * size.steps)
    alone = world.replay_seconds(size.steps)
    free(sequences)
    return {
        "passes": 2 * size.steps,
        "wall_ms_per_pass": wall / (2 * size.steps) * 1e3,
        "graph_alone_ms": alone * 1e3,
        "idle_share": max(0.0, 1 - alone * 2 * size.steps / wall),
        "tokens_per_second": size.sessions * 2 * size.steps / wall,
    }


def throughput(world: World) -> dict[str, Any]:
    """Prompts, then tokens one by one, each session waiting for its replies."""
    size = world.size
    sequences = world.sessions(size.sessions, 0)
    prompt, token = world.step(size.prompt), world.step(1)
    together = max(1, PASS_ROWS // size.prompt)
    began = time.perf_counter()
    for first in range(0, size.sessions, together):
        world.run(sequences[first : first + together], prompt, 1)
    prefilled = time.perf_counter()
    seconds = world.run(sequences, token, size.new)
    ended = time.perf_counter()
    free(sequences)
    decode = statistics.median(wall for wall, _ in seconds)
    return {
        "sessions": size.sessions,
        "prompt": size.prompt,
        "new": size.new,
        "prefill_tokens_per_second": size.sessions * size.prompt / (prefilled - began),
        "decode_tokens_per_second": size.sessions / decode,
        "tokens_per_second": size.sessions * size.new / (ended - began),
    }


def free(sequences: Sequence[KVSequence]) -> None:
    """Give pages back."""
    for sequence in sequences:
        sequence.free()
