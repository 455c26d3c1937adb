"""What the kernels can serve. Callers check at load or admission, so that no launch ever meets a broken limit."""

from __future__ import annotations

from split_llama.mask import MAX_TREE_NODES

__all__ = ["MAX_GROUP", "MAX_HEAD_DIM", "MAX_TREE_NODES", "PAGE_SIZES", "unsupported"]

MAX_HEAD_DIM = 256
# The query heads of one key-value head share a query tile, which has at most so many rows.
MAX_GROUP = 128
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def unsupported(*, head_dim: int, page_size: int, group: int = 1, tree_nodes: int = 0) -> str | None:
    """Name the limit that a model or a request breaks, in words; `None` where the kernels serve it.

    `group` is the number of query heads per key-value head, `tree_nodes` the size of a draft tree.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the kernels serve head_dim 1 to {MAX_HEAD_DIM}, not {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"the kernels serve page sizes that are powers of two from 8 to 256, not {page_size}"
    if not 1 <= group <= MAX_GROUP:
        return f"the kernels serve 1 to {MAX_GROUP} query heads per key-value head, not {group}"
    if not 0 <= tree_nodes <= MAX_TREE_NODES:
        return f"the kernels serve draft trees of at most {MAX_TREE_NODES} nodes, not {tree_nodes}"
    return None
