"""What the kernel must give, in plain PyTorch: dense softmax from the mask descriptors, without planner or tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.kv_pages import KVPages, dequantise
from kernels.paged_attention.launch import PagedQuery


def attention_reference(
    q_NHK: Tensor,
    kv: KVPages,
    queries: Sequence[PagedQuery],
    *,
    window: int,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention `[N, H, K]` of the queries' rows, which lie back to back, computed and returned in `dtype`.

    K and V count where a row sees them, so that garbage elsewhere, NaN included, cannot matter. A row that sees
    nothing gives zeros.
    """
    out = torch.zeros(q_NHK.shape, dtype=dtype, device=q_NHK.device)
    row = 0
    for query in queries:
        rows = slice(row, row + query.count)
        row += query.count
        seen = visibility(query, window, q_NHK.device)
        keys = seen.any(0).nonzero().flatten()
        if len(keys):
            k_SGK, v_SGK = (gather(kv, part, query, keys).to(dtype) for part in ("k", "v"))
            out[rows] = _attend(q_NHK[rows].to(dtype), k_SGK, v_SGK, seen[:, keys], scale)
    return out


def visibility(query: PagedQuery, window: int, device: torch.device) -> Tensor:
    """Spell out a query's mask, bool `[count, kv_len]`."""
    mask = query.mask
    key = torch.arange(mask.kv_len, device=device)
    pos = torch.arange(query.first, query.first + query.count, device=device)[:, None]
    seen = key <= pos
    if window:
        seen = seen & ((key < mask.sink_end) | (key > pos - window))
    tail = key >= mask.tail_begin
    if bool(tail.any()):
        bits = query.tree or (0,) * query.count
        nodes = range(mask.kv_len - mask.tail_begin)
        seen[:, mask.tail_begin :] = torch.tensor([[bool(row >> n & 1) for n in nodes] for row in bits], device=device)
    return seen & (key >= mask.kv_begin)


def gather(kv: KVPages, part: str, query: PagedQuery, keys: Tensor) -> Tensor:
    """Take key slots out of a sequence's pages: `[keys, G, K]` float32, of `part` "k" or "v"."""
    table = torch.tensor(query.block_table, device=keys.device)
    pages, offsets = table[keys // kv.page_size], keys % kv.page_size
    stored, scale = (kv.k, kv.k_scale) if part == "k" else (kv.v, kv.v_scale)
    if stored.dtype == torch.float8_e4m3fn:
        # Not every torch indexes float8.
        stored = stored.view(torch.uint8)[pages, offsets].view(torch.float8_e4m3fn)
    else:
        stored = stored[pages, offsets]
    return dequantise(stored, None if scale is None else scale[pages, offsets])


def _attend(q_NHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, seen_NS: Tensor, scale: float) -> Tensor:
    group = q_NHK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = k_SGK.repeat_interleave(group, 1), v_SGK.repeat_interleave(group, 1)
    scores = torch.einsum("nhk,shk->hns", q_NHK, k_SHK) * scale
    weights = scores.masked_fill(~seen_NS, float("-inf")).softmax(-1)
    # A row that sees nothing has a softmax of NaN.
    weights = weights.masked_fill(~seen_NS.any(1)[:, None], 0.0)
    return torch.einsum("hns,shk->nhk", weights, v_SHK)
