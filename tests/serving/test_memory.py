"""The size of the KV cache, what a pass needs beside it, and how running out of memory is told."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TinyModel, write_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serving import memory
from serving.hosted import largest_pass
from serving.memory import (
    SWAP_GIB_CUDA,
    PassSize,
    estimate_pass_bytes,
    free_bytes,
    give_back,
    is_out_of_memory,
    peak_bytes,
    plan_pages,
    size_cache,
)
from serving.settings import SECTION, ServerSettings
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.errors import ModelError, UsageError
from split_llama.load import load_segment
from split_llama.settings import load_settings

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"page_bytes": 1000, "page_size": 16, "max_model_len": 100}


def test_the_largest_pass_is_kept_aside() -> None:
    free = {"free": 100_000, "fraction": 0.5, "max_sequences": 100}
    assert plan_pages(**free, workspace=40_000, **SIZES).num_pages == 30
    with pytest.raises(ModelError, match=r"0\.1 MiB free the largest pass takes 0\.1 MiB"):
        plan_pages(**free, workspace=90_000, **SIZES)
    with pytest.raises(ModelError, match="--max-num-batched-tokens"):
        plan_pages(**free, workspace=200_000, **SIZES)


@given(st.integers(0, 10**6), st.floats(0.01, 1), st.integers(0, 10**6), st.integers(1, 50))
def test_never_more_than_is_free(free: int, fraction: float, workspace: int, sequences: int) -> None:
    try:
        budget = plan_pages(free=free, fraction=fraction, workspace=workspace, max_sequences=sequences, **SIZES)
    except ModelError:
        assert (free - workspace) * fraction < 7 * 1000
        return
    assert budget.num_bytes <= fraction * (free - workspace) <= free - workspace
    assert 7 <= budget.num_pages <= 7 * sequences


def test_the_pass_runs_before_free_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"free": 10_000_000}
    monkeypatch.setattr(memory, "free_bytes", lambda device: state["free"])
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    # What the allocator kept of the pass is free again.
    monkeypatch.setattr(memory.torch.cuda, "empty_cache", lambda: state.update(free=state["free"] + 100_000))

    def workspace() -> int:
        # What a pass leaves behind for good: libraries' buffers, code.
        state["free"] = 900_000
        return 500_000

    budget = size_cache(CPU, workspace=workspace, fraction=1.0, swap_gib=None, max_sequences=10**6, **SIZES)
    assert (budget.num_pages, budget.workspace, budget.swap_pages) == (500, 500_000, 0)


def test_a_pass_that_does_not_fit_is_told_with_what_to_do() -> None:
    def workspace() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelError, match="--max-num-batched-tokens"):
        size_cache(CPU, workspace=workspace, fraction=1.0, swap_gib=None, max_sequences=1, **SIZES)


def test_host_memory_for_swapped_pages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    free = {"cpu": 2**40, "cuda": 2**20}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])

    def swap_pages(device: str, gib: float | None) -> int:
        fixed = {"workspace": lambda: 0, "fraction": 1.0, "max_sequences": 64}
        return size_cache(torch.device(device), swap_gib=gib, **fixed, **SIZES).swap_pages

    assert swap_pages("cuda", None) == SWAP_GIB_CUDA * 2**30 // 1000
    assert swap_pages("cuda", 0.5) == 2**29 // 1000
    assert swap_pages("cuda", 0.0) == swap_pages("cpu", None) == 0
    assert not caplog.records
    free["cpu"] = 2**30
    assert swap_pages("cuda", None) == 2**29 // 1000
    assert "less host memory" in caplog.text
    # On a CPU the pages themselves are in the same memory: 64 sequences of 7 pages.
    assert swap_pages("cpu", 1.0) == (2**30 - 64 * 7 * 1000) // 2 // 1000


class PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(("rows", "positions"), [(64, 2000), (256, 100), (256, 2000)])
def test_the_estimate_covers_what_the_largest_pass_takes(
    tmp_path: Any, kv_dtype: torch.dtype, rows: int, positions: int
) -> None:
    folder = write_model(tmp_path / "tiny", TinyModel(layers=3, hidden=64, max_positions=2048))
    checkpoint = Checkpoint.open(folder)
    segment = load_segment(checkpoint, BlockRange(1, 2), dtype=torch.float32, device=CPU)
    size = PassSize(rows, rows // 4, positions)
    work = largest_pass(segment, size, kv_dtype)
    with PeakOfTensors() as measured:
        work()
    estimate = estimate_pass_bytes(checkpoint.config, size, torch.float32, kv_dtype)
    assert measured.peak <= estimate
    assert estimate <= 8 * measured.peak, "so large an estimate wastes memory"


def test_the_measured_peak_is_what_the_work_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA figures, from a device that is not there."""
    state = {"allocated": 100, "peak": 900, "synced": 0}
    cuda = memory.torch.cuda
    monkeypatch.setattr(cuda, "synchronize", lambda device: state.update(synced=state["synced"] + 1))
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: state.update(peak=state["allocated"]))
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: state["peak"])
    assert peak_bytes(torch.device("cuda"), lambda: state.update(peak=250)) == 150
    assert state["synced"] == 2


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_no_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_a_real_refusal_of_the_allocator_is_one() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_what_a_failed_pass_held_is_let_go() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        held = torch.ones(10)
        kept.append(weakref.ref(held))
        raise MemoryError

    try:
        fails()
    except MemoryError as error:
        assert kept[0]() is not None
        give_back(error)
        assert kept[0]() is None


def test_what_is_free_is_a_figure_of_this_machine() -> None:
    assert 0 < free_bytes(CPU) < 2**50


@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16", "int8", "fp8"])
def test_types_of_the_cache_can_be_chosen(name: str) -> None:
    loaded = load_settings(ServerSettings, SECTION, {"kv_cache_dtype": name}, environ={})
    assert loaded.settings.kv_cache_dtype == name


@pytest.mark.parametrize(
    ("flag", "value"), [("swap_space", "-1"), ("swap_space", "inf"), ("swap_space", "nan"), ("kv_cache_dtype", "fp4")]
)
def test_settings_that_will_not_do(flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=flag):
        load_settings(ServerSettings, SECTION, {flag: value}, environ={})


def test_swap_space_is_in_gib() -> None:
    assert math.isclose(
        load_settings(ServerSettings, SECTION, {"swap_space": "0.5"}, environ={}).settings.swap_space, 0.5
    )
