"""The payload of a STEP frame: tree bits, accepted nodes, rows.

[tree:   count x u64]                                     with TREE
[accept: aux x u8, zero-padded to a multiple of 8]         with ACCEPT
[rows:   count rows in the header's codec]
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from split_llama.draft_tree import MAX_ACCEPTED, check_accept, check_tree
from split_llama.errors import BadRequest, BadStates
from split_llama.mask import MAX_TREE_NODES
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import HEADER_SIZE, Flag, Frame, Kind

NODE_BYTES = 8

# Plain integers: an IntFlag makes a new member at each `&`, and this module runs for every step.
_LAST, _NONE, _DRAFT, _TREE, _ACCEPT = (int(flag) for flag in Flag)
_ALL = _LAST | _NONE | _DRAFT | _TREE | _ACCEPT


@dataclass(slots=True)
class StepPayload:
    """A parsed step: `tree` ancestor bits per row, self included; `accept` nodes, root to leaf; `rows` in `codec`."""

    tree: tuple[int, ...] | None
    accept: tuple[int, ...] | None
    codec: Codec
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
    return StepPayload(tree, accept, codec, payload[tree_bytes + accept_bytes :])


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
