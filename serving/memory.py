"""How many KV pages fit: from the memory that is free once the weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from split_llama.errors import ModelError

CPU_FRACTION = 0.4
CUDA_FRACTION = 0.9
_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class PageBudget:
    """Pages of `page_bytes` bytes and `page_size` positions, for sequences of up to `max_model_len` positions."""

    num_pages: int
    page_bytes: int
    page_size: int

    @property
    def num_slots(self) -> int:
        """Positions that all sequences may hold together."""
        return self.num_pages * self.page_size


def free_bytes(device: torch.device) -> int:
    """Give the memory free on a device now, in bytes; on a CPU what this process or its container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit = _container_limit()
    return free if limit is None else min(free, limit)


def _container_limit() -> int | None:
    """Give what a control group (version 2) leaves to this process; the machine's own figure does not know of it."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdigit() else None


def plan_pages(
    *, free: int, fraction: float, page_bytes: int, page_size: int, max_model_len: int, max_sequences: int
) -> PageBudget:
    """Take as many pages as `fraction` of `free` bytes holds, and no more than `max_sequences` full sequences need.

    Raises `ModelError` when not even one sequence of `max_model_len` positions fits.
    """
    per_sequence = -(-max_model_len // page_size)
    affordable = int(free * fraction) // page_bytes
    if affordable < per_sequence:
        raise ModelError(
            f"the KV cache of one sequence of {max_model_len} positions takes "
            f"{per_sequence * page_bytes / _MIB:.1f} MiB, but {fraction:.0%} of the {free / _MIB:.1f} MiB free are "
            f"{free * fraction / _MIB:.1f} MiB; give a smaller --max-model-len (at most {affordable * page_size} fits) "
            "or a larger --gpu-memory-utilization"
        )
    return PageBudget(min(affordable, per_sequence * max_sequences), page_bytes, page_size)
