"""The payload of a STEP frame: tree bits, accepted nodes, rows.

[tree:   count x u64]                                     with TREE
[accept: aux x u8, zero-padded to a multiple of 8]         with ACCEPT
[rows:   count rows in the header's codec]
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from split_llama.errors import BadRequest, BadStates
from split_llama.mask import MAX_TREE_NODES
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import HEADER_SIZE, Flag, Frame, Kind

MAX_ACCEPTED = 255
NODE_BYTES = 8

# Plain integers: an IntFlag makes a new member at each `&`, and this module runs for every step.
_LAST, _NONE, _DRAFT, _TREE, _ACCEPT = (int(flag) for flag in Flag)
_ALL = _LAST | _NONE | _DRAFT | _TREE | _ACCEPT


@dataclass(frozen=True, slots=True)
class StepPayload:
    """A parsed step: `tree` ancestor bits per row, self included; `accept` nodes, root to leaf; `rows` encoded."""

    tree: tuple[int, ...] | None
    accept: tuple[int, ...] | None
    rows: bytes | memoryview


def build_step(
    *,
    handle: int,
    seq: int,
    first: int,
    count: int,
    codec: Codec,
    rows: bytes | memoryview,
    ack: int = 0,
    flags: int = 0,
    tree: Sequence[int] | None = None,
    accept: Sequence[int] | None = None,
) -> Frame:
    """Build a STEP of `count` encoded rows. TREE and ACCEPT are set from `tree` and `accept`; a tree is a draft.

    Raises `BadRequest` for a tree or a list of accepted nodes that the other side would refuse.
    """
    parts: list[bytes | memoryview] = []
    if tree is not None:
        check_tree(tree)
        flags |= _TREE | _DRAFT
        parts.append(struct.pack(f"<{len(tree)}Q", *tree))
    if accept is not None:
        check_accept(accept)
        flags |= _ACCEPT
        parts.append(bytes(accept).ljust(_padded(len(accept)), b"\0"))
    payload = b"".join((*parts, rows)) if parts else rows
    aux = len(accept) if accept is not None else 0
    return Frame(Kind.STEP, codec, flags, aux, handle, seq, ack, first, count, payload)


def parse_step(frame: Frame, width: int) -> StepPayload:
    """Check a STEP against its own header and cut its payload up; nothing is copied but tree and accept.

    Raises `BadRequest` for malformed flags, tree or accepted nodes, `BadStates` for an unknown codec or a payload that
    does not hold `count` rows of `width` values. Whether the step fits the session is the session's to say.
    """
    flags = _check_flags(frame)
    tree_bytes = frame.count * NODE_BYTES if flags & _TREE else 0
    accept_bytes = _padded(frame.aux) if flags & _ACCEPT else 0
    codec = Codec.from_wire(frame.codec)
    expected = tree_bytes + accept_bytes + frame.count * row_bytes(codec, width)
    if len(frame.payload) != expected:
        raise BadStates(
            f"expected {expected} bytes: {frame.count} rows of {width} values in {codec.label}, {tree_bytes} bytes of "
            f"tree and {accept_bytes} of accepted nodes; {len(frame.payload)} bytes came"
        )
    payload = memoryview(frame.payload)
    tree = accept = None
    if flags & _TREE:
        tree = struct.unpack_from(f"<{frame.count}Q", payload)
        check_tree(tree)
    if flags & _ACCEPT:
        accept = tuple(payload[tree_bytes : tree_bytes + frame.aux])
        if any(payload[tree_bytes + frame.aux : tree_bytes + accept_bytes]):
            raise BadRequest("the padding behind the accepted nodes must be zero")
        check_accept(accept)
    return StepPayload(tree, accept, payload[tree_bytes + accept_bytes :])


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


def max_rows(codec: Codec, width: int, max_frame_bytes: int) -> int:
    """Give the rows of `width` values that always fit one frame, whatever tree and accepted nodes go with them."""
    room = max_frame_bytes - HEADER_SIZE - _padded(MAX_ACCEPTED)
    return max(1, room // (row_bytes(codec, width) + NODE_BYTES))


def reply_rows(flags: int, count: int) -> int:
    """Give how many rows the reply to a step of `count` rows carries."""
    if flags & _NONE:
        return 0
    return 1 if flags & _LAST else count


def _check_flags(frame: Frame) -> int:
    flags = frame.flags
    if unknown := flags & ~_ALL:
        raise BadRequest(f"unknown flags 0x{unknown:02x} on a step")
    if flags & _LAST and flags & _NONE:
        raise BadRequest("REPLY_LAST and REPLY_NONE exclude each other")
    if flags & _TREE and not flags & _DRAFT:
        raise BadRequest("TREE needs DRAFT: a tree of rows is always tentative")
    if flags & _TREE and frame.count > MAX_TREE_NODES:
        raise BadRequest(f"a draft tree has at most {MAX_TREE_NODES} nodes, {frame.count} came")
    if frame.aux and not flags & _ACCEPT:
        raise BadRequest(f"aux counts accepted nodes and is 0 without ACCEPT, {frame.aux} came")
    if frame.aux > MAX_ACCEPTED:
        raise BadRequest(f"at most {MAX_ACCEPTED} nodes can be accepted, {frame.aux} came")
    if frame.count == 0:
        raise BadRequest("a step has at least one row")
    return flags


def _padded(size: int) -> int:
    return -(-size // 8) * 8
