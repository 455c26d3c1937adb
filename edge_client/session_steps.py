"""What a session has under way: its steps, and the draft that was sent last."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.step_log import EncodedRows
from split_llama.wire.frame import HEADER_SIZE
from split_llama.wire.step import NODE_BYTES


@dataclass(slots=True)
class Step:
    """A submitted step until its answer; `token` is `None` for replayed rows."""

    first: int
    rows: EncodedRows
    flags: int
    token: int | None
    seq: int
    tree: tuple[int, ...] | None = None
    accept: tuple[int, ...] | None = None
    sent: bool = False

    @property
    def size(self) -> int:
        """Bytes of its frame."""
        tree = NODE_BYTES * len(self.tree) if self.tree is not None else 0
        accept = -(-len(self.accept) // 8) * 8 if self.accept is not None else 0
        return HEADER_SIZE + tree + accept + len(self.rows.data)


@dataclass(slots=True)
class PendingDraft:
    """The draft submitted last. `rows` come with its answer, `path` with `settle`; then the next step says it all."""

    base: int
    is_tree: bool
    rows: EncodedRows | None = None
    path: tuple[int, ...] | None = None

    def accept_for(self, first: int) -> tuple[int, ...] | None:
        """Give the nodes that a step at `first` accepts; a chain says it by `first` alone."""
        if not self.is_tree or first <= self.base:
            return None
        assert self.path is not None, "a draft is settled before the next step"
        return self.path[: first - self.base]
