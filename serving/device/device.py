"""All that the runner asks of a device: pinned memory, marks in its stream, captured work.

`CudaDevice` is the only place here that knows `torch.cuda`. `HostDevice` does the same on a CPU, so that the whole
runner can be tested in Triton's interpreter. Everything is queued on PyTorch's current stream, which is the default
one: whoever else touches the KV pages stays in order with the passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the device's queue."""

    def wait(self) -> None:
        """Block until the device has come this far."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Give the device's seconds between two marks that were both reached."""
        ...


class Device(Protocol):
    """Where passes run."""

    torch_device: torch.device

    def entered(self) -> AbstractContextManager[object]:
        """Make this the calling thread's device."""
        ...

    def host_bytes(self, size: int) -> Tensor:
        """Allocate host memory uint8 `[size]` that the device copies from and to without waiting."""
        ...

    def mark(self) -> Mark:
        """Mark the point that the queue has reached."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, and give what repeats it on the same memory.

        `work` only queues: it neither waits for the device nor reads from it.
        """
        ...


class CudaDevice:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self._capture_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        # Graphs replay one at a time, so all of them may use the same memory for what lies between input and output.
        self._pool = torch.cuda.graph_pool_handle()

    def entered(self) -> AbstractContextManager[object]:
        """See `Device.entered`."""
        return torch.cuda.device(self.torch_device)

    def host_bytes(self, size: int) -> Tensor:
        """See `Device.host_bytes`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        """See `Device.mark`."""
        return _CudaMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` on a side stream, which compiles kernels and loads libraries, then capture it there."""
        stream = self._capture_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may wait for an earlier pass meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class _CudaMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _CudaMark), "marks of different devices"
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


class HostDevice:
    """A CPU as a device: work is done when it is queued, and captured work is called again."""

    torch_device = torch.device("cpu")

    def entered(self) -> AbstractContextManager[object]:
        """See `Device.entered`."""
        return nullcontext()

    def host_bytes(self, size: int) -> Tensor:
        """See `Device.host_bytes`."""
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> Mark:
        """See `Device.mark`."""
        return _HostMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`."""
        work()
        return work


class _HostMark:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _HostMark), "marks of different devices"
        return self._at - earlier._at


def make_device(device: torch.device) -> Device:
    """Give the runner's view of a PyTorch device."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice()
