"""Batches for the attention tests: every mask family, pages in random order, and NaN wherever nothing may look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.kv_pages import QUANTISED_MAX, KVPages, quantise
from kernels.paged_attention.launch import AttentionInputs, Launch, Scratch, paged_attention
from kernels.paged_attention.planner import Tiles, plan_attention
from kernels.paged_attention.reference import attention_reference, visibility
from split_llama.mask import MaskDescriptor


@dataclass(frozen=True)
class Run:
    """One sequence's rows, as the engine's plans describe them."""

    mask: MaskDescriptor
    first: int
    count: int = 1
    tree: tuple[int, ...] | None = None
    block_table: tuple[int, ...] = ()


@dataclass(frozen=True)
class Heads:
    """Geometry of the heads, and the types of q and of the pages."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Batch:
    """Everything a launch takes, on one device. Rows of q after the runs' own hold NaN."""

    runs: tuple[Run, ...]
    q: Tensor
    kv: KVPages
    window: int

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return float(self.q.shape[2] ** -0.5)

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What the kernel must give, without the rows that belong to no run."""
        rows = sum(run.count for run in self.runs)
        return attention_reference(self.q[:rows], self.kv, self.runs, window=self.window, scale=self.scale, dtype=dtype)


def decode(length: int) -> Run:
    return Run(MaskDescriptor(length), length - 1)


def left_padded(length: int) -> Run:
    return Run(MaskDescriptor(length, kv_begin=min(5, length - 1)), length - 1)


def evicted(length: int) -> Run:
    return Run(MaskDescriptor(length, kv_begin=length // 2, rope_offset=-3), length - 1)


def with_sinks(length: int) -> Run:
    return Run(MaskDescriptor(length, sink_end=4), length - 1)


def evicted_with_sinks(length: int) -> Run:
    return Run(MaskDescriptor(length, kv_begin=2, sink_end=6), max(length - 3, 0), min(3, length))


def prefill_chunk(length: int) -> Run:
    count = min(13, length)
    return Run(MaskDescriptor(length), length - count, count)


def padding_rows(length: int) -> Run:
    """Rows of which the first are left padding: they see nothing."""
    count = min(length, 9)
    return Run(MaskDescriptor(length, kv_begin=length - count // 2), length - count, count)


def nothing_to_see(length: int) -> Run:
    return Run(MaskDescriptor(length, kv_begin=length), length - 1)


TREE = (0b1, 0b11, 0b101, 0b1011, 0b10101, 0b110101, 0b1000001)


def tree(length: int) -> Run:
    return Run(MaskDescriptor(length + len(TREE), tail_begin=length), length, len(TREE), TREE)


def chain(length: int) -> Run:
    nodes = tuple((1 << (depth + 1)) - 1 for depth in range(4))
    return Run(MaskDescriptor(length + 4, tail_begin=length), length, 4, nodes)


def wide_tree(length: int) -> Run:
    """64 nodes, of which only a root and its last children count here: tiles between them are not visible."""
    nodes = (1, *(1 | 1 << node for node in range(1, 64)))
    return Run(MaskDescriptor(length + 64, tail_begin=length, sink_end=3), length, 64, nodes)


# Name: the window in which the family is tried, and the run for a length.
FAMILIES: dict[str, tuple[int, Callable[[int], Run]]] = {
    "decode": (0, decode),
    "left padding": (0, left_padded),
    "window": (24, decode),
    "window and left padding": (40, left_padded),
    "sinks and window": (20, with_sinks),
    "evicted prefix": (0, evicted),
    "evicted, sinks and window": (9, evicted_with_sinks),
    "chunked prefill": (0, prefill_chunk),
    "chunked prefill in a window": (7, prefill_chunk),
    "chunked prefill in a wider window": (40, prefill_chunk),
    "rows that see nothing": (0, padding_rows),
    "sequence that sees nothing": (0, nothing_to_see),
    "tree": (0, tree),
    "tree in a window": (10, tree),
    "chain": (0, chain),
}


def make_batch(
    runs: Sequence[Run], heads: Heads, *, window: int = 0, seed: int = 0, spare_rows: int = 2, device: str = "cpu"
) -> Batch:
    """Lay the runs out on randomly ordered pages. Slots that no row sees hold NaN, as do rows of no run."""
    random = torch.Generator().manual_seed(seed)
    needed = [-(-run.mask.kv_len // heads.page_size) for run in runs]
    order = torch.randperm(sum(needed) + 2, generator=random).tolist()
    placed = []
    for run, pages in zip(runs, needed, strict=True):
        placed.append(replace(run, block_table=tuple(order[:pages])))
        order = order[pages:]
    shape = (sum(needed) + 2, heads.page_size, heads.kv_heads, heads.head_dim)
    seen = torch.zeros(shape[:2], dtype=torch.bool)
    for run in placed:
        keys = visibility(run, window, torch.device("cpu")).any(0).nonzero().flatten()
        seen[torch.tensor(run.block_table)[keys // heads.page_size], keys % heads.page_size] = True
    k, k_scale = _pages(torch.randn(shape, generator=random), seen, heads.kv_dtype)
    v, v_scale = _pages(torch.randn(shape, generator=random), seen, heads.kv_dtype)
    rows = sum(run.count for run in runs)
    q = torch.randn(rows + spare_rows, heads.kv_heads * heads.group, heads.head_dim, generator=random)
    q[rows:] = float("nan")
    parts = [None if part is None else part.to(device) for part in (k_scale, v_scale)]
    kv = KVPages(k.to(device), v.to(device), *parts)
    return Batch(tuple(placed), q.to(heads.dtype).to(device), kv, window)


def _pages(values: Tensor, seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if dtype not in QUANTISED_MAX:
        return values.masked_fill(~seen[..., None, None], float("nan")).to(dtype), None
    stored, scale = quantise(values, dtype)
    if dtype == torch.float8_e4m3fn:
        stored.view(torch.uint8)[~seen] = 0x7F
    return stored, scale.masked_fill(~seen[..., None], float("nan"))


def attend_batch(batch: Batch, tiles: Tiles, *, launch: Launch | None = None) -> Tensor:
    """Plan and launch; rows that the kernel does not write keep the value 7."""
    device, heads = batch.q.device, batch.q.shape[1]
    plan = plan_attention(batch.runs, window=batch.window, tiles=tiles, group=heads // batch.kv.kv_heads)
    scratch = scratch_for(batch, tiles, plan.num_slots)
    out = torch.full_like(batch.q, 7.0)
    inputs = AttentionInputs.of(batch.runs, plan, device)
    attend(batch, inputs, tiles, scratch, out, launch)
    return out


def attend(
    batch: Batch, inputs: AttentionInputs, tiles: Tiles, scratch: Scratch, out: Tensor, launch: Launch | None = None
) -> None:
    """Launch with inputs made by the caller."""
    paged_attention(
        batch.q,
        batch.kv,
        inputs,
        window=batch.window,
        tiles=tiles,
        scale=batch.scale,
        scratch=scratch,
        out_NHK=out,
        launch=launch,
    )


def scratch_for(batch: Batch, tiles: Tiles, slots: int) -> Scratch:
    """Scratch for a number of slots, filled with NaN."""
    kv_heads, head_dim = batch.kv.kv_heads, batch.kv.head_dim
    scratch = Scratch.allocate(slots, kv_heads=kv_heads, rows=tiles.rows, head_dim=head_dim, device=batch.q.device)
    scratch.out.fill_(float("nan"))
    scratch.lse.fill_(float("nan"))
    return scratch


def assert_matches(out: Tensor, batch: Batch, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Compare the runs' rows with the reference in float64, and see that no other row was written.

    Unless told otherwise the difference may be the rounding of the output, and of sums in float32.
    """
    rows = sum(run.count for run in batch.runs)
    rtol, atol = rtol or 2 * torch.finfo(out.dtype).eps, atol or 4e-6
    torch.testing.assert_close(out[:rows].double(), batch.reference(), rtol=rtol, atol=atol)
    assert (out[rows:] == 7.0).all()
