"""Draft trees: what makes one, and which of its nodes can be accepted. Pure.

A tree is one int of ancestor bits per node: bit `i` of node `n` says that node `i` is an ancestor of `n` or `n` itself.
Node 0 is the root, and a node comes after its parent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from split_llama.errors import BadRequest
from split_llama.mask import MAX_TREE_NODES

# One byte holds a node's number, and one the count of them.
MAX_ACCEPTED = 255


def is_chain(tree: Sequence[int]) -> bool:
    """Say whether every node's parent is the node before it."""
    return all(bits == (2 << node) - 1 for node, bits in enumerate(tree))


def check_tree(tree: Sequence[int]) -> None:
    """Raise `BadRequest` unless node 0 is the root and each other node `i` has `1 << i` plus an earlier node's bits."""
    if not 1 <= len(tree) <= MAX_TREE_NODES:
        raise BadRequest(f"a draft tree has 1 to {MAX_TREE_NODES} nodes, {len(tree)} came")
    for node, bits in enumerate(tree):
        above = bits ^ (1 << node)
        parent = above.bit_length() - 1
        if node == 0 and above == 0:
            continue
        if not 0 <= parent < node or tree[parent] != above:
            raise BadRequest(
                f"node {node} of the draft tree has ancestor bits 0x{bits:x}: expected its own bit and all bits of an "
                "earlier node"
            )


def check_accept(accept: Sequence[int]) -> None:
    """Raise `BadRequest` unless the nodes begin at the root and ascend (a child always comes after its parent)."""
    if not 1 <= len(accept) <= MAX_ACCEPTED:
        raise BadRequest(f"1 to {MAX_ACCEPTED} nodes can be accepted, {len(accept)} came")
    if accept[0] != 0 or any(later <= node for node, later in itertools.pairwise(accept)):
        raise BadRequest(f"accepted nodes must run from the root (0) to a leaf, each once; {list(accept)} came")
    if accept[-1] > MAX_ACCEPTED:
        raise BadRequest(f"a node's number is at most {MAX_ACCEPTED}, {accept[-1]} came")


def check_path(accept: Sequence[int], count: int, tree: Sequence[int] | None) -> None:
    """Raise `BadRequest` unless `accept` is a path from the root of the pending draft.

    The draft has `count` rows; `tree` holds their ancestor bits, `None` for a chain.
    """
    check_accept(accept)
    bits = 0
    for depth, node in enumerate(accept):
        bits |= 1 << node
        on_path = node == depth if tree is None else node < len(tree) and tree[node] == bits
        if node >= count or not on_path:
            raise BadRequest(f"accepted nodes {list(accept)} are no path in the pending draft of {count} rows")
