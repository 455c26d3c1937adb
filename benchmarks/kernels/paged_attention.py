"""Paged attention: decode, verifying drafts and a prompt, against what torch offers, and a sweep of tiles.

On a CPU everything runs tiny and interpreted: that shows that the script works, and says nothing about speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.bandwidth import copy_bandwidth, seconds
from kernels.kv_pages import QUANTISED_MAX, KVPages, quantise
from kernels.paged_attention.launch import AttentionInputs, Launch, Scratch, launch_for, paged_attention, tiles_for
from kernels.paged_attention.planner import Tiles, plan_attention
from kernels.paged_attention.reference import attention_reference
from split_llama.mask import MaskDescriptor

Row = dict[str, Any]
Configuration = tuple[Tiles, Launch]


def _configurations(*numbers: tuple[int, int, int, int]) -> list[Configuration]:
    """Packed query rows, keys, warps and pipeline stages."""
    return [(Tiles(rows, keys), Launch(warps, stages)) for rows, keys, warps, stages in numbers]


FEW_ROWS = _configurations(
    *((16, 32, 4, 3), (16, 64, 4, 3), (16, 16, 4, 3), (16, 32, 4, 4), (16, 64, 4, 4)),
    *((16, 64, 4, 2), (16, 64, 8, 3), (16, 32, 2, 4), (16, 128, 8, 3)),
)
TREES = _configurations(
    *((64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3), (32, 64, 4, 3), (32, 32, 4, 3), (16, 64, 4, 3)),
)
MANY_ROWS = _configurations(
    *((64, 32, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3)),
    *((128, 64, 8, 2), (128, 32, 8, 4), (64, 64, 8, 3)),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how many configurations of each sweep (`None`: all)."""

    batch: int = 64
    context: int = 4096
    drafts: int = 8
    prompt: int = 8192
    heads: int = 32
    kv_heads: tuple[int, ...] = (8, 32)
    head_dim: int = 128
    page_size: int = 16
    sweep: int | None = None


TINY = Sizes(batch=2, context=40, drafts=3, prompt=24, heads=4, kv_heads=(2, 4), head_dim=16, page_size=8, sweep=2)


@dataclass(frozen=True)
class _Run:
    mask: MaskDescriptor
    first: int
    count: int
    block_table: tuple[int, ...]
    tree: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Bench:
    """A device and what to measure on it."""

    device: torch.device
    quick: bool
    sizes: Sizes

    def random(self, *shape: int) -> Tensor:
        """Normal values in bfloat16."""
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)


class Problem:
    """Sequences alike, on randomly ordered pages: `rows` new rows each after `context` slots; with `drafts` a chain."""

    def __init__(
        self,
        bench: Bench,
        case: str,
        kv_heads: int,
        *,
        batch: int,
        context: int,
        rows: int,
        drafts: bool = False,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        sizes = bench.sizes
        self.bench, self.case, self.rows, self.slots = bench, case, rows, context + rows
        self.group = sizes.heads // kv_heads
        pages = -(-self.slots // sizes.page_size)
        order = torch.randperm(batch * pages).view(batch, pages)
        mask = MaskDescriptor(self.slots, tail_begin=context) if drafts else MaskDescriptor(self.slots)
        chain = tuple((1 << (depth + 1)) - 1 for depth in range(rows)) if drafts else None
        self.runs = [_Run(mask, context, rows, tuple(table), chain) for table in order.tolist()]
        self.tables = order.to(bench.device)
        k, v = (bench.random(batch * pages, sizes.page_size, kv_heads, sizes.head_dim) for _ in "kv")
        if kv_dtype in QUANTISED_MAX:
            (k, k_scale), (v, v_scale) = quantise(k, kv_dtype), quantise(v, kv_dtype)
            self.kv = KVPages(k, v, k_scale, v_scale)
        else:
            self.kv = KVPages(k, v)
        self.q = bench.random(batch * rows, sizes.heads, sizes.head_dim)
        self.scale = sizes.head_dim**-0.5

    @property
    def bytes(self) -> int:
        """Bytes that must move: every visible K and V with its scale once, q and the output once."""
        kv = self.kv
        per_slot = 2 * kv.kv_heads * (kv.head_dim * kv.k.dtype.itemsize + (4 if kv.quantised else 0))
        return len(self.runs) * self.slots * per_slot + 2 * self.q.numel() * self.q.dtype.itemsize

    def measure(self, configuration: Configuration | None = None) -> Row:
        """Time our kernel, by default as this shape is given tiles, and compare rows with the reference."""
        bench, kv = self.bench, self.kv
        default = tiles_for(self.rows, group=self.group, head_dim=kv.head_dim, dtype=self.q.dtype, kv_dtype=kv.k.dtype)
        tiles, launch = configuration or (default, launch_for(default, kv))
        start = time.perf_counter()
        plan = plan_attention(self.runs, window=0, tiles=tiles, group=self.group)
        planned = time.perf_counter() - start
        inputs = AttentionInputs.of(self.runs, plan, bench.device)
        scratch = Scratch.allocate(
            plan.num_slots, kv_heads=kv.kv_heads, rows=tiles.rows, head_dim=kv.head_dim, device=bench.device
        )
        out = torch.empty_like(self.q)
        options: dict[str, Any] = {
            "window": 0,
            "tiles": tiles,
            "scale": self.scale,
            "scratch": scratch,
            "launch": launch,
        }
        took = seconds(
            lambda: paged_attention(self.q, kv, inputs, out_NHK=out, **options),
            bench.device,
            bench.quick,
            in_graph=True,
        )
        return self.row("ours" if configuration is None else "ours, swept", took) | {
            "tiles": [tiles.rows, tiles.keys, *launch],
            "host_planning_seconds": planned,
            "max_error": self.max_error(out),
        }

    def sweep(self, configurations: Sequence[Configuration]) -> Iterator[Row]:
        """Time our kernel in each configuration that holds a group; one that the device refuses says why."""
        for tiles, launch in configurations[: self.bench.sizes.sweep]:
            if tiles.rows >= self.group:
                try:
                    yield self.measure((tiles, launch))
                except Exception as error:
                    yield self.refused("ours, swept", error) | {"tiles": [tiles.rows, tiles.keys, *launch]}

    def refused(self, what: str, error: Exception) -> Row:
        """A row without figures."""
        return {
            "kernel": "paged_attention",
            "case": self.case,
            "what": what,
            "error": f"{type(error).__name__}: {error}"[:300],
        }

    def max_error(self, out: Tensor) -> float:
        """Largest difference from the reference in float32 over at most the last 64 rows of the first sequence."""
        run, skipped = self.runs[0], max(self.rows - 64, 0)
        tree = run.tree[skipped:] if run.tree else None
        last = _Run(run.mask, run.first + skipped, self.rows - skipped, run.block_table, tree)
        q, ours = self.q[skipped : self.rows], out[skipped : self.rows]
        expected = attention_reference(q, self.kv, [last], window=0, scale=self.scale, dtype=torch.float32)
        return float((ours.float() - expected).abs().max())

    def row(self, what: str, took: float) -> Row:
        """A row of figures."""
        speed = self.bytes / took
        return {
            "kernel": "paged_attention",
            "case": self.case,
            "what": what,
            "batch": len(self.runs),
            "rows": self.rows,
            "context": self.slots,
            "heads": self.q.shape[1],
            "kv_heads": self.kv.kv_heads,
            "head_dim": self.kv.head_dim,
            "page_size": self.kv.page_size,
            "kv_dtype": str(self.kv.k.dtype).removeprefix("torch."),
            "bytes": self.bytes,
            "microseconds": took * 1e6,
            "copy_share": speed / copy_bandwidth(self.bench.device, self.bench.quick),
        }

    def gathered(self, pages: Tensor) -> Tensor:
        """All sequences' slots as `[S, G, slots, K]`."""
        return pages[self.tables].flatten(1, 2)[:, : self.slots].transpose(1, 2)

    def against_sdpa(self) -> Iterator[Row]:
        """Time torch's scaled_dot_product_attention for a row each, on gathered KV and with the gather."""
        device, quick = self.bench.device, self.bench.quick
        q = self.q.view(len(self.runs), self.rows, *self.q.shape[1:]).transpose(1, 2)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def gather() -> tuple[Tensor, Tensor]:
            return self.gathered(self.kv.k).contiguous(), self.gathered(self.kv.v).contiguous()

        gathered = gather()
        took = seconds(lambda: attend(*gathered), device, quick, in_graph=True)
        yield self.row("torch SDPA on KV gathered before", took)
        took = seconds(lambda: attend(*gather()), device, quick, in_graph=True)
        yield self.row("torch SDPA with the gather", took)

    def against_flex(self) -> Row:
        """Time torch's paged flex_attention over as many slots, with pages of 128: its block size."""
        what = "torch flex_attention, pages of 128"
        try:
            return self.row(what, _flex_seconds(self))
        except Exception as error:
            # Experimental in torch: where it does not run, the row says so.
            return self.refused(what, error)


def measure(device: torch.device, quick: bool) -> list[Row]:
    """All figures: decode and verify for each number of key-value heads, then a prompt."""
    bench = Bench(device, quick, (Sizes(sweep=3) if quick else Sizes()) if device.type == "cuda" else TINY)
    rows = [row for kv_heads in bench.sizes.kv_heads for row in _decode(bench, kv_heads)]
    return [*rows, *_prompt(bench)]


def _decode(bench: Bench, kv_heads: int) -> Iterator[Row]:
    sizes = bench.sizes

    def one_row_each(case: str, kv_dtype: torch.dtype) -> Problem:
        context = sizes.context - 1
        return Problem(bench, case, kv_heads, batch=sizes.batch, context=context, rows=1, kv_dtype=kv_dtype)

    problem = one_row_each("decode", torch.bfloat16)
    one = problem.measure()
    yield one
    yield from problem.sweep(FEW_ROWS)
    yield from problem.against_sdpa()
    if bench.device.type == "cuda":
        yield problem.against_flex()
    for kv_dtype in QUANTISED_MAX:
        problem = one_row_each("decode, 8-bit pages", kv_dtype)
        yield problem.measure()
        yield from problem.sweep(FEW_ROWS)
    context = sizes.context - sizes.drafts
    problem = Problem(bench, "verify", kv_heads, batch=sizes.batch, context=context, rows=sizes.drafts, drafts=True)
    for row in (problem.measure(), *problem.sweep(TREES)):
        yield row | ({} if "error" in row else {"times_one_token": row["microseconds"] / one["microseconds"]})


def _prompt(bench: Bench) -> Iterator[Row]:
    """A whole prompt beside flash attention on contiguous KV."""
    sizes = bench.sizes
    problem = Problem(bench, "prompt", sizes.kv_heads[0], batch=1, context=0, rows=sizes.prompt)
    q, k, v = (
        part.transpose(0, 1)[None] for part in (problem.q, problem.kv.k.flatten(0, 1), problem.kv.v.flatten(0, 1))
    )

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if bench.device.type == "cuda" else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    theirs = problem.row("torch flash SDPA on contiguous KV", seconds(flash, bench.device, bench.quick, in_graph=True))
    # Two products of 2 N N K operations for each query head, of which the causal mask leaves half.
    operations = 2 * sizes.prompt**2 * sizes.head_dim * sizes.heads
    for row in (theirs, problem.measure(), *problem.sweep(MANY_ROWS)):
        figures = {
            "flops_per_second": operations / row["microseconds"] * 1e6,
            "times_flash": theirs["microseconds"] / row["microseconds"],
        }
        yield row | ({} if "error" in row else figures)


def _flex_seconds(problem: Problem) -> float:
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    bench, batch, slots, page = problem.bench, len(problem.runs), problem.slots, 128
    per_sequence = -(-slots // page)
    paged = PagedAttention(batch * per_sequence, page, batch, device=str(bench.device))
    for index in range(batch):
        paged.reserve(torch.tensor(index, device=bench.device), torch.tensor(slots, device=bench.device))

    def before_end(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < slots

    logical = create_block_mask(before_end, batch, None, 1, per_sequence * page, device=str(bench.device))
    mask = paged.convert_logical_block_mask(logical)
    kv_heads, head_dim = problem.kv.kv_heads, problem.kv.head_dim
    k, v = (bench.random(1, kv_heads, batch * per_sequence * page, head_dim) for _ in "kv")
    q = problem.q.view(batch, 1, -1, head_dim).transpose(1, 2)
    attend = torch.compile(flex_attention)
    return seconds(
        lambda: attend(q, k, v, block_mask=mask, enable_gqa=problem.group > 1), bench.device, bench.quick, in_graph=True
    )
