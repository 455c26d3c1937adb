"""Cache edits on the device: what a plan does to KV pages before its rows, in as few launches as its order allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kernels.cache_edits.kernel import copy_page, move_slots, zero_pages
from serving.device.device import Device
from serving.device.memory import HostArena, upload
from split_llama.engine.kv_cache import KVCache
from split_llama.engine.pages import CacheEdit, CopyPage, MoveSlots, ZeroPages
from split_llama.mask import MAX_TREE_NODES

# Moves of one sequence come in rows of one of these lengths, so that few kernels are compiled.
MOVES = (8, MAX_TREE_NODES)


@dataclass(frozen=True, slots=True)
class _Touched:
    """The pages (or slots, for moves) that an edit reads and writes."""

    kind: type[CacheEdit]
    reads: frozenset[int]
    writes: frozenset[int]

    @classmethod
    def by(cls, edit: CacheEdit) -> _Touched | None:
        """Say what an edit touches; `None` for one that goes through host memory and stays alone."""
        match edit:
            case ZeroPages(pages):
                return cls(ZeroPages, frozenset(), frozenset(pages))
            case CopyPage(source, target, _):
                return cls(CopyPage, frozenset([source]), frozenset([target]))
            case MoveSlots(sources, targets):
                return cls(MoveSlots, frozenset(sources), frozenset(targets))
        return None


def group_edits(edits: Iterable[CacheEdit]) -> Iterator[list[CacheEdit]]:
    """Gather neighbours of one kind of which none touches what another writes; the groups apply in order."""
    group: list[CacheEdit] = []
    reads: set[int] = set()
    writes: set[int] = set()
    for edit in edits:
        touched = _Touched.by(edit)
        joins = (
            group
            and touched is not None
            and isinstance(group[0], touched.kind)
            and writes.isdisjoint(touched.writes | touched.reads)
            and reads.isdisjoint(touched.writes)
        )
        if not joins:
            if group:
                yield group
            group, reads, writes = [], set(), set()
        group.append(edit)
        if touched is not None:
            reads |= touched.reads
            writes |= touched.writes
    if group:
        yield group


def apply_edits(edits: Iterable[CacheEdit], cache: KVCache, arena: HostArena, device: Device) -> None:
    """Carry the edits out in order, in every block; those that go to or from host memory are the cache's own."""
    for group in group_edits(edits):
        match group[0]:
            case ZeroPages():
                _zero(group, cache, arena, device)
            case CopyPage():
                _copy(group, cache, arena, device)
            case MoveSlots():
                _move(group, cache, arena, device)
            case _:
                cache.apply(tuple(group))


def warm_up_edits(cache: KVCache, arena: HostArena, device: Device) -> None:
    """Compile the kernels, on edits that edit nothing."""
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    zero_pages(cache.k, cache.v, _upload(np.full(1, -1, np.int64), arena, device), **scales)
    copy_page(cache.k, cache.v, _upload(np.full((1, 3), -1, np.int64), arena, device), **scales)
    for width in MOVES:
        sources, targets = _upload(np.full((2, 1, width), -1, np.int64), arena, device)
        move_slots(cache.k, cache.v, sources, targets, **scales)


def _zero(group: Iterable[CacheEdit], cache: KVCache, arena: HostArena, device: Device) -> None:
    pages = [page for edit in group if isinstance(edit, ZeroPages) for page in edit.pages]
    tensor = _upload(np.array(pages, np.int64), arena, device)
    zero_pages(cache.k, cache.v, tensor, k_scale=cache.k_scale, v_scale=cache.v_scale)


def _copy(group: Iterable[CacheEdit], cache: KVCache, arena: HostArena, device: Device) -> None:
    copies = [(edit.source, edit.target, edit.slots) for edit in group if isinstance(edit, CopyPage)]
    tensor = _upload(np.array(copies, np.int64), arena, device)
    copy_page(cache.k, cache.v, tensor, k_scale=cache.k_scale, v_scale=cache.v_scale)


def _move(group: Iterable[CacheEdit], cache: KVCache, arena: HostArena, device: Device) -> None:
    moves = [edit for edit in group if isinstance(edit, MoveSlots)]
    longest = max(len(edit.sources) for edit in moves)
    width = next(size for size in MOVES if size >= longest)
    table = np.full((2, len(moves), width), -1, np.int64)
    for row, edit in enumerate(moves):
        table[0, row, : len(edit.sources)] = edit.sources
        table[1, row, : len(edit.targets)] = edit.targets
    sources, targets = _upload(table, arena, device)
    move_slots(cache.k, cache.v, sources, targets, k_scale=cache.k_scale, v_scale=cache.v_scale)


def _upload(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]], arena: HostArena, device: Device) -> Tensor:
    return upload({"edit": array}, arena, device)["edit"]
