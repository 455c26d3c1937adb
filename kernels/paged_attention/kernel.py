"""The kernels: online-softmax attention over the tiles of a work item, and the combine of split queries.

Legend: M packed query rows of a tile, T keys of a tile, D head_dim padded to a power of two. A packed row is one query
row and one of the GROUP query heads that share a key-value head: `m = row * GROUP + head_in_group`.

Online softmax: Milakov and Gimelshein 2018; tiles as in FlashAttention-2 (Dao 2023), in base 2: `scale` holds
`log2(e)` besides the softmax scale, and the log-sum-exp of a partial result is a base-2 logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of a work item, a sequence and a combine: what planner.py writes and what is read below.
ITEM_FIELDS = tl.constexpr(8)
SEQUENCE_FIELDS = tl.constexpr(4)
COMBINE_FIELDS = tl.constexpr(4)
LAST_NODE = tl.constexpr(63)


@triton.jit
def _tile_of(step, first_tiles, first, second):
    """Number the tiles of an item's two ranges through: the first range's tiles, then the second's."""
    return tl.where(step < first_tiles, first, second - first_tiles) + step


@triton.jit
def _visible(key, oldest, newest, ancestors, kv_begin, kv_len, sink_end, tail_begin, WINDOW: tl.constexpr):
    """The mask descriptor for one row (`oldest` = `newest` = its slot), or for what at least one of several rows sees.

    Several rows have consecutive slots from `oldest` to `newest`; their `ancestors` are or-ed.
    """
    below = key <= newest
    if WINDOW > 0:
        below = below & ((key < sink_end) | (key > oldest - WINDOW))
    node = tl.minimum(tl.maximum(key - tail_begin, 0), LAST_NODE)
    in_path = ((ancestors >> node.to(tl.int64)) & 1) != 0
    return tl.where(key >= tail_begin, in_path, below) & (key >= kv_begin) & (key < kv_len)


@triton.jit
def _widen(stored, dtype: tl.constexpr):
    """Convert a tile as stored to the type that the tensor cores multiply in.

    Bytes are float8_e4m3fn on a device without that type: its exponent, moved to float16's place, is 8 too small.
    """
    if stored.dtype == tl.uint8:
        bits = stored.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32).to(dtype) * 256.0
    if stored.dtype == dtype:
        return stored
    return stored.to(tl.float32).to(dtype)


# The width of the block tables changes as sequences grow: it must not choose between compiled variants.
@triton.jit(do_not_specialize=["max_pages"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    items_ptr,
    sequences_ptr,
    tables_ptr,
    row_slots_ptr,
    ancestors_ptr,
    max_pages,
    scale,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program per work item and key-value head; heads are innermost, so that neighbours read the same pages.

    Tiles are multiplied in q's type, or in float32 with `UPCAST` (the interpreter gets bfloat16 products wrong).
    """
    dot_type: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    # Three TF32 products stand for a float32 one: as good as float32 sums are, and without their registers.
    precision: tl.constexpr = "tf32x3"
    # A probability times a scale can be below float16's range; what is stored in 8 bits is exact in bfloat16.
    narrow: tl.constexpr = v_scale_ptr is not None and dot_type == tl.float16
    p_type: tl.constexpr = tl.bfloat16 if narrow else dot_type
    item_ptr = items_ptr + (tl.program_id(0) // KV_HEADS) * ITEM_FIELDS
    kv_head = tl.program_id(0) % KV_HEADS
    seq = tl.load(item_ptr)
    if seq < 0:
        return
    row_begin = tl.load(item_ptr + 1)
    row_count = tl.load(item_ptr + 2)
    first = tl.load(item_ptr + 3)
    first_tiles = tl.load(item_ptr + 4) - first
    second = tl.load(item_ptr + 5)
    tiles = first_tiles + tl.load(item_ptr + 6) - second
    out_slot = tl.load(item_ptr + 7)
    kv_begin = tl.load(sequences_ptr + seq * SEQUENCE_FIELDS)
    kv_len = tl.load(sequences_ptr + seq * SEQUENCE_FIELDS + 1)
    sink_end = tl.load(sequences_ptr + seq * SEQUENCE_FIELDS + 2)
    tail_begin = tl.load(sequences_ptr + seq * SEQUENCE_FIELDS + 3)
    table_ptr = tables_ptr + seq.to(tl.int64) * max_pages

    m = tl.arange(0, TILE_M)
    lane = tl.arange(0, TILE_T)
    d = tl.arange(0, PADDED_DIM)
    row = row_begin + m // GROUP
    in_tile = m < row_count * GROUP
    head = kv_head * GROUP + m % GROUP
    q_offset = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
    q_mask = in_tile[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_offset[:, None] + d[None, :], mask=q_mask, other=0.0).to(dot_type)
    # Rows that the item lacks count as its first row, so that they stretch no bound.
    in_item = tl.where(in_tile, row, row_begin)
    pos = tl.load(row_slots_ptr + in_item)
    ancestors = tl.load(ancestors_ptr + in_item)

    # What at least one row may see bounds the loads: of all other keys not even garbage is read.
    newest = tl.max(pos, 0)
    oldest = tl.min(pos, 0)
    any_ancestors = tl.reduce_or(ancestors, 0)

    peak = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    key = _tile_of(0, first_tiles, first, second) * TILE_T + lane
    next_page = tl.load(table_ptr + key // PAGE_SIZE, mask=key < kv_len, other=0)
    for step in range(tiles):
        start = _tile_of(step, first_tiles, first, second) * TILE_T
        key = start + lane
        # The pages of the next tile are looked up one step early: K and V can then be fetched several steps ahead.
        page = next_page
        next_key = _tile_of(step + 1, first_tiles, first, second) * TILE_T + lane
        next_page = tl.load(table_ptr + next_key // PAGE_SIZE, mask=next_key < kv_len, other=0)
        seen = _visible(key, oldest, newest, any_ancestors, kv_begin, kv_len, sink_end, tail_begin, WINDOW)
        slot = (page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE) * KV_HEADS + kv_head
        kv_offset = slot[:, None] * HEAD_DIM + d[None, :]
        kv_mask = seen[:, None] & (d < HEAD_DIM)[None, :]

        k = tl.load(k_ptr + kv_offset, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(_widen(k, dot_type)), input_precision=precision)
        if k_scale_ptr is not None:
            scores = scores * tl.load(k_scale_ptr + slot, mask=seen, other=0.0)[None, :]
        # Most tiles of a long context are visible whole: they skip the mask.
        whole = (start >= kv_begin) & (start + TILE_T <= tl.minimum(tl.minimum(oldest + 1, kv_len), tail_begin))
        if WINDOW > 0:
            whole = whole & ((start + TILE_T <= sink_end) | (start > newest - WINDOW))
        if not whole:
            each, slots = key[None, :], pos[:, None]
            visible = _visible(each, slots, slots, ancestors[:, None], kv_begin, kv_len, sink_end, tail_begin, WINDOW)
            scores = tl.where(visible, scores, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        # A row that has seen nothing yet has a peak of -inf: 0 in its place keeps the exponents free of NaN.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores * scale - anchor[:, None])
        shrink = tl.exp2(peak - anchor)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        peak = new_peak

        v = tl.load(v_ptr + kv_offset, mask=kv_mask, other=0.0)
        if v_scale_ptr is not None:
            p = p * tl.load(v_scale_ptr + slot, mask=seen, other=0.0)[None, :]
        acc = tl.dot(p.to(p_type), _widen(v, p_type), acc, input_precision=precision)

    norm = tl.where(total == 0.0, 1.0, total)
    out = acc / norm[:, None]
    if out_slot < 0:
        tl.store(out_ptr + q_offset[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        part = (out_slot.to(tl.int64) * KV_HEADS + kv_head) * TILE_M + m
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + d[None, :], out, mask=q_mask)
        tl.store(lse_ptr + part, peak + tl.log2(norm), mask=in_tile)


@triton.jit
def combine(
    out_ptr,
    partial_ptr,
    lse_ptr,
    combines_ptr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Weigh the partial results of one packed row by their log-sum-exp; one program per combine, head and row.

    Slots are taken `SLOTS` at a time, in order, so that a result depends on its own number of slots alone.
    """
    kv_head = tl.program_id(1)
    m = tl.program_id(2)
    combine_ptr = combines_ptr + tl.program_id(0) * COMBINE_FIELDS
    row_count = tl.load(combine_ptr + 1)
    if m >= row_count * GROUP:
        return
    row = tl.load(combine_ptr) + m // GROUP
    first_slot = tl.load(combine_ptr + 2)
    num_slots = tl.load(combine_ptr + 3)
    d = tl.arange(0, PADDED_DIM)
    index = tl.arange(0, SLOTS)
    peaks = tl.full([SLOTS], float("-inf"), tl.float32)
    for start in range(0, num_slots, SLOTS):
        slot = (first_slot + start + index).to(tl.int64)
        part = (slot * KV_HEADS + kv_head) * TILE_M + m
        peaks = tl.maximum(peaks, tl.load(lse_ptr + part, mask=start + index < num_slots, other=float("-inf")))
    peak = tl.max(peaks, 0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)

    total = tl.zeros([SLOTS], tl.float32)
    acc = tl.zeros([SLOTS, PADDED_DIM], tl.float32)
    for start in range(0, num_slots, SLOTS):
        slot = (first_slot + start + index).to(tl.int64)
        part = (slot * KV_HEADS + kv_head) * TILE_M + m
        in_use = start + index < num_slots
        weight = tl.exp2(tl.load(lse_ptr + part, mask=in_use, other=float("-inf")) - anchor)
        partial = tl.load(
            partial_ptr + part[:, None] * HEAD_DIM + d[None, :],
            mask=in_use[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        total += weight
        acc += weight[:, None] * partial
    norm = tl.sum(total, 0)
    out = tl.sum(acc, 0) / tl.where(norm == 0.0, 1.0, norm)
    offset = (row.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP) * HEAD_DIM
    tl.store(out_ptr + offset + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
