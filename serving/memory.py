"""Memory: the KV pages that fit beside the largest pass once weights are loaded, and what to do when it runs out."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from split_llama.config import ModelConfig
from split_llama.errors import ModelError

CPU_FRACTION = 0.4
CUDA_FRACTION = 0.9
_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20
_GIB = 2**30
SWAP_GIB_CUDA = 4.0
# Host memory that others may want is not locked away: so much of what is free may be.
SWAP_FRACTION = 0.5
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")

log = logging.getLogger("fl_llama.memory")


@dataclass(frozen=True, slots=True)
class PageBudget:
    """Pages of `page_bytes` bytes and `page_size` positions; `swap_pages` more contents fit into host memory.

    `workspace` is what was kept aside for the largest pass, in bytes.
    """

    num_pages: int
    page_bytes: int
    page_size: int
    workspace: int = 0
    swap_pages: int = 0

    @property
    def num_slots(self) -> int:
        """Positions that all sequences may hold together."""
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes


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


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error of a pass means that memory for it could not be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The allocator of CPU tensors and some CUDA libraries raise a plain RuntimeError.
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in words for sign in _OUT_OF_MEMORY)


def give_back(error: BaseException) -> None:
    """Let go of what a failed pass still holds, and give unused device memory back."""
    traceback.clear_frames(error.__traceback__)
    _empty_cache()


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class PassSize:
    """The largest pass: rows in all and of one step, and the positions of the longest session."""

    rows: int
    step_rows: int
    positions: int


def estimate_pass_bytes(config: ModelConfig, size: PassSize, compute: torch.dtype, kv: torch.dtype) -> int:
    """Estimate the working memory of a pass of the PyTorch backend, in bytes.

    Per row: residuals and norms, Q, K and V before and after the rotation, gate, up and their product. Attention goes
    run by run: masks over rows and keys, one per query head of a group as numbers, and a copy of K and V where pages
    are apart or not stored in the compute type.
    """
    width = compute.itemsize
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    row = (4 * config.hidden_size + 3 * heads + 4 * config.intermediate_size) * width
    group = config.num_attention_heads // config.num_key_value_heads
    masks = min(size.step_rows, size.rows) * size.positions * (4 + group * (1 + width))
    head = width if kv == compute else width + torch.float32.itemsize
    keys = 2 * size.positions * config.num_key_value_heads * config.head_dim * head
    return size.rows * row + masks + keys


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Run `work` on a CUDA device and give the most memory that it had allocated at once, in bytes."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def size_cache(
    device: torch.device,
    *,
    workspace: Callable[[], int],
    fraction: float | None,
    swap_gib: float | None,
    page_bytes: int,
    page_size: int,
    max_model_len: int,
    max_sequences: int,
) -> PageBudget:
    """Size the KV cache: `workspace` gives the bytes that the largest pass needs, and may run one to find out.

    `fraction` of what is then free is taken; `swap_gib` GiB of host memory, but no more than half of what is free
    there. Raises `ModelError` as `plan_pages` does, and when there is not even room for that pass.
    """
    is_host = device.type == "cpu"
    kept_aside = _bytes_of_pass(device, workspace)
    budget = plan_pages(
        free=free_bytes(device),
        fraction=fraction or (CPU_FRACTION if is_host else CUDA_FRACTION),
        workspace=kept_aside,
        page_bytes=page_bytes,
        page_size=page_size,
        max_model_len=max_model_len,
        max_sequences=max_sequences,
    )
    asked = int(_GIB * ((0.0 if is_host else SWAP_GIB_CUDA) if swap_gib is None else swap_gib))
    spare = free_bytes(torch.device("cpu")) - (budget.num_bytes if is_host else 0)
    swap = min(asked, int(SWAP_FRACTION * max(0, spare)))
    if swap < asked:
        log.warning(
            "less host memory for swapped pages than asked for asked_mib=%d mib=%d", asked // _MIB, swap // _MIB
        )
    return replace(budget, swap_pages=swap // page_bytes)


def _bytes_of_pass(device: torch.device, workspace: Callable[[], int]) -> int:
    try:
        return workspace()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back(error)
        raise ModelError(
            f"the largest pass does not fit beside the weights: {free_bytes(device) / _MIB:.1f} MiB are free; give a "
            "smaller --max-num-batched-tokens, --max-model-len or --kv-cache-dtype"
        ) from error
    finally:
        # What the allocator keeps for later passes would not count as free.
        _empty_cache()


def plan_pages(
    *,
    free: int,
    fraction: float,
    page_bytes: int,
    page_size: int,
    max_model_len: int,
    max_sequences: int,
    workspace: int = 0,
) -> PageBudget:
    """Take as many pages as `fraction` of `free` bytes less the `workspace` of a pass holds.

    No more than `max_sequences` full sequences need. Raises `ModelError` when not even one sequence of `max_model_len`
    positions fits.
    """
    per_sequence = -(-max_model_len // page_size)
    usable = max(0, free - workspace)
    affordable = int(usable * fraction) // page_bytes
    if affordable < per_sequence:
        raise ModelError(
            f"the KV cache of one sequence of {max_model_len} positions takes "
            f"{per_sequence * page_bytes / _MIB:.1f} MiB, but of the {free / _MIB:.1f} MiB free the largest pass takes "
            f"{workspace / _MIB:.1f} MiB, and {fraction:.0%} of the rest are {usable * fraction / _MIB:.1f} MiB; give "
            f"a smaller --max-model-len (at most {affordable * page_size} fits), --max-num-batched-tokens or "
            "--kv-cache-dtype, or a larger --gpu-memory-utilization"
        )
    return PageBudget(min(affordable, per_sequence * max_sequences), page_bytes, page_size, workspace)
