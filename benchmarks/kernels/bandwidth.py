"""Timing of kernels that move bytes: beside a copy of the same device, and beside the PyTorch composite.

On CUDA a call is captured in a graph, so that launching from Python is not what is timed, and the L2 cache is
overwritten before each replay. On a CPU (Triton's interpreter) the times mean nothing: the scripts only run.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSHED_BYTES = 512 * 2**20
COPIED_BYTES = 2**30


def measured(
    kernel: str,
    case: str,
    moved_bytes: int,
    ours: Callable[[], object],
    composite: Callable[[], object],
    device: torch.device,
    quick: bool,
    *,
    composite_in_graph: bool = True,
) -> dict[str, Any]:
    """Time our kernel and the composite; `moved_bytes` is what must be read and written at least.

    A composite that asks the device for sizes cannot be captured (`composite_in_graph=False`): its launches count.
    """
    our_seconds = seconds(ours, device, quick, in_graph=True)
    composite_seconds = seconds(composite, device, quick, in_graph=composite_in_graph)
    return {
        "kernel": kernel,
        "case": case,
        "bytes": moved_bytes,
        "microseconds": our_seconds * 1e6,
        "copy_share": moved_bytes / our_seconds / copy_bandwidth(device, quick),
        "composite_microseconds": composite_seconds * 1e6,
        "composite_in_graph": composite_in_graph,
        "times_composite": composite_seconds / our_seconds,
    }


@functools.cache
def copy_bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes per second, read and written, of a large copy."""
    count = (COPIED_BYTES if device.type == "cuda" else 2**20) // (4 if quick else 1)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / seconds(lambda: target.copy_(source), device, quick, in_graph=True)


def seconds(run: Callable[[], object], device: torch.device, quick: bool, *, in_graph: bool) -> float:
    """Median over several calls with a cold L2 cache."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    call = _captured(run) if in_graph else run
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(10 if quick else 50):
        flushed.zero_()
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()
        events.append((begin_event, end_event))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
