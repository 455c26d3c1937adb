"""Edits of the KV cache in all blocks at once: slots moved after `accept`, pages copied, pages cleared.

K and V are `[blocks, pages, page_size, G, K]`, their scales, where there are some, `[blocks, pages, page_size, G]`.
Contents are moved as 32-bit words (or bytes, where a slot is no whole number of words) and never read as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.limits import MAX_TREE_NODES
from kernels.runtime import next_power_of_two

# Words that one program moves.
WORDS = 4096


@triton.jit
def _move(slots_ptr, sources, targets, moved, part, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Move some columns of slots of `WIDTH` words."""
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = moved[:, None] & (columns < WIDTH)[None, :]
    held = tl.load(slots_ptr + sources[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
    # A target may be another's source: all threads have read before any writes.
    tl.debug_barrier()
    tl.store(slots_ptr + targets[:, None] * WIDTH + columns[None, :], held, mask=mask)


@triton.jit
def move_slots_kernel(
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sources_ptr,
    targets_ptr,
    slots,
    MOVES: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    """Program `(part of a slot, sequence, block)`; parts are those of K, of V, then both scales; see `move_slots`."""
    PARTS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    part, sequence = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * slots
    moves = tl.arange(0, LANES)
    sources = tl.load(sources_ptr + sequence * MOVES + moves, mask=moves < MOVES, other=-1)
    targets = tl.load(targets_ptr + sequence * MOVES + moves, mask=moves < MOVES, other=-1)
    moved = (sources >= 0) & (targets >= 0)
    if part < PARTS:
        _move(k_ptr + first * WIDTH, sources, targets, moved, part, WIDTH, COLUMNS)
    elif part < 2 * PARTS:
        _move(v_ptr + first * WIDTH, sources, targets, moved, part - PARTS, WIDTH, COLUMNS)
    elif SCALES > 0:
        if part == 2 * PARTS:
            _move(k_scale_ptr + first * SCALES, sources, targets, moved, 0, SCALES, SCALE_COLUMNS)
        else:
            _move(v_scale_ptr + first * SCALES, sources, targets, moved, 0, SCALES, SCALE_COLUMNS)


@triton.jit
def _fill(pages_ptr, source, target, part, count, PAGE: tl.constexpr, CLEAR: tl.constexpr, WORDS: tl.constexpr):
    """Copy, or clear, the first `count` of a page's `PAGE` words, as far as they lie in this part."""
    words = part * WORDS + tl.arange(0, WORDS)
    mask = words < count
    if CLEAR:
        held = tl.zeros((WORDS,), pages_ptr.dtype.element_ty)
    else:
        held = tl.load(pages_ptr + source * PAGE + words, mask=mask, other=0)
    tl.store(pages_ptr + target * PAGE + words, held, mask=mask)


@triton.jit
def fill_pages_kernel(
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    edits_ptr,
    pages,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALES: tl.constexpr,
    CLEAR: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program `(part of a page, edit, block)`; parts are those of K, of V, then of both scales.

    An edit is a page to clear, or three numbers: source page, target page, slots. See `copy_page` and `zero_pages`.
    """
    PAGE: tl.constexpr = PAGE_SIZE * WIDTH
    SCALE_PAGE: tl.constexpr = PAGE_SIZE * SCALES
    PARTS: tl.constexpr = (PAGE + WORDS - 1) // WORDS
    SCALE_PARTS: tl.constexpr = (SCALE_PAGE + WORDS - 1) // WORDS
    part, edit = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * pages
    if CLEAR:
        target = tl.load(edits_ptr + edit)
        source, count = target, PAGE_SIZE
    else:
        source = tl.load(edits_ptr + edit * 3)
        target = tl.load(edits_ptr + edit * 3 + 1)
        count = tl.load(edits_ptr + edit * 3 + 2)
    if target >= 0:
        source, target = first + source, first + target
        if part < PARTS:
            _fill(k_ptr, source, target, part, count * WIDTH, PAGE, CLEAR, WORDS)
        elif part < 2 * PARTS:
            _fill(v_ptr, source, target, part - PARTS, count * WIDTH, PAGE, CLEAR, WORDS)
        elif SCALES > 0:
            part -= 2 * PARTS
            if part < SCALE_PARTS:
                _fill(k_scale_ptr, source, target, part, count * SCALES, SCALE_PAGE, CLEAR, WORDS)
            else:
                _fill(v_scale_ptr, source, target, part - SCALE_PARTS, count * SCALES, SCALE_PAGE, CLEAR, WORDS)


def move_slots(
    k: Tensor,
    v: Tensor,
    sources_SE: Tensor,
    targets_SE: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Move slots (page * page_size + offset) in every block; a sequence's sources are all read before it writes.

    `k`, `v` `[blocks, pages, page_size, G, K]` of any dtype, scales `[blocks, pages, page_size, G]` float32, all
    contiguous. Row s of `sources_SE` and `targets_SE` (int64, -1 for no move) are the moves of one sequence, at most
    `MAX_TREE_NODES`; no row may touch a slot that another row moves.
    """
    cache = _Cache.of(k, v, k_scale, v_scale)
    sequences, moves = sources_SE.shape
    assert targets_SE.shape == sources_SE.shape, f"{tuple(targets_SE.shape)} targets, {tuple(sources_SE.shape)} sources"
    assert moves <= MAX_TREE_NODES, f"{moves} moves in a sequence, at most {MAX_TREE_NODES} are read before any writes"
    if not sequences or not moves:
        return
    lanes = next_power_of_two(moves)
    columns = min(next_power_of_two(cache.width), WORDS // MAX_TREE_NODES)
    parts = 2 * triton.cdiv(cache.width, columns) + (2 if cache.scales else 0)
    move_slots_kernel[(parts, sequences, len(k))](
        *cache.tensors,
        sources_SE.contiguous(),
        targets_SE.contiguous(),
        k.shape[1] * k.shape[2],
        MOVES=moves,
        LANES=lanes,
        WIDTH=cache.width,
        COLUMNS=columns,
        SCALES=cache.scales,
        SCALE_COLUMNS=next_power_of_two(cache.scales),
        num_warps=4,
        enable_fp_fusion=True,
    )


def copy_page(
    k: Tensor, v: Tensor, copies_C3: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """Copy the first slots of pages to other pages in every block.

    `copies_C3` int64 holds source page, target page and number of slots; target -1 copies nothing. No page may be the
    target of one copy and a page of another. The cache as in `move_slots`.
    """
    assert copies_C3.shape[1:] == (3,), f"copies are [n, 3], not {tuple(copies_C3.shape)}"
    _fill_pages(_Cache.of(k, v, k_scale, v_scale), k, copies_C3, clear=False)


def zero_pages(
    k: Tensor, v: Tensor, pages_Z: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """Clear pages (int64, -1 for none), and their scales, in every block. The cache as in `move_slots`."""
    _fill_pages(_Cache.of(k, v, k_scale, v_scale), k, pages_Z, clear=True)


def _fill_pages(cache: _Cache, k: Tensor, edits: Tensor, clear: bool) -> None:
    if not len(edits):
        return
    blocks, pages, page_size = k.shape[:3]
    words = min(WORDS, next_power_of_two(page_size * cache.width))
    parts = 2 * triton.cdiv(page_size * cache.width, words) + 2 * triton.cdiv(page_size * cache.scales, words)
    fill_pages_kernel[(parts, len(edits), blocks)](
        *cache.tensors,
        edits.contiguous(),
        pages,
        PAGE_SIZE=page_size,
        WIDTH=cache.width,
        SCALES=cache.scales,
        CLEAR=clear,
        WORDS=words,
        num_warps=4,
        enable_fp_fusion=True,
    )


@dataclass(frozen=True, slots=True)
class _Cache:
    """K, V and scales as words: `width` words in a slot of K or V, `scales` in a slot's scales (0 for none)."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    width: int
    scales: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> _Cache:
        assert k.shape == v.shape, f"k of {tuple(k.shape)}, v of {tuple(v.shape)}"
        assert (k_scale is None) == (v_scale is None), "scales of both K and V, or of neither"
        for scale in (k_scale, v_scale):
            assert scale is None or scale.shape == k.shape[:4], f"scales of {tuple(scale.shape)} for {tuple(k.shape)}"
        assert all(part is None or part.is_contiguous() for part in (k, v, k_scale, v_scale)), "the cache is contiguous"
        slot_bytes = k.shape[3] * k.shape[4] * k.dtype.itemsize
        word = torch.int32 if slot_bytes % 4 == 0 else torch.int8
        scales = [None if scale is None else scale.flatten().view(torch.int32) for scale in (k_scale, v_scale)]
        return cls(
            (k.flatten().view(word), v.flatten().view(word), scales[0], scales[1]),
            slot_bytes // word.itemsize,
            0 if k_scale is None else k.shape[3],
        )
