"""The edge's weight slice over HTTP: which partitions may be had, digests made off the loop, and byte ranges."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass

from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.edge_slice import EdgeSlice, SliceFile, SliceManifest
from split_llama.errors import BadRequest, PartitionNotAllowed

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Slices:
    """Edge slices by partition. A manifest takes about a second per gigabyte, so it is made once, in a thread."""

    def __init__(self, checkpoint: Checkpoint, allowed: Partition) -> None:
        self._checkpoint = checkpoint
        self._allowed = allowed
        self._slices: dict[Partition, EdgeSlice] = {}
        self._manifests: dict[Partition, asyncio.Task[SliceManifest]] = {}
        # One at a time: whoever asks for all partitions at once gets no more of the machine than anybody else.
        self._turn = asyncio.Lock()

    def check(self, partition: Partition) -> None:
        """Raise `PartitionNotAllowed` unless all blocks the partition leaves to the server are hosted."""
        allowed, blocks = self._allowed, self._checkpoint.config.num_hidden_layers
        if partition.p < allowed.p or partition.q < allowed.q or partition.p + partition.q >= blocks:
            raise PartitionNotAllowed(
                f"partition {partition} asked for; this server allows p >= {allowed.p} and q >= {allowed.q} "
                f"with p + q < {blocks}"
            )

    def slice(self, partition: Partition) -> EdgeSlice:
        """Give the slice of a partition. Raises `PartitionNotAllowed`."""
        self.check(partition)
        if partition not in self._slices:
            self._slices[partition] = EdgeSlice(self._checkpoint, partition)
        return self._slices[partition]

    def known(self, partition: Partition) -> SliceManifest | None:
        """Give the manifest if it has been made already."""
        task = self._manifests.get(partition)
        return task.result() if task is not None and task.done() and not task.exception() else None

    async def manifest(self, partition: Partition) -> SliceManifest:
        """Give names, sizes and digests of a slice; made once, whoever asks. Raises `PartitionNotAllowed`."""
        edge_slice = self.slice(partition)
        task = self._manifests.get(partition)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(self._hash(edge_slice), name=f"manifest {partition}")
            self._manifests[partition] = task
        # Whoever asked first may go away; the others still want the answer.
        return await asyncio.shield(task)

    async def _hash(self, edge_slice: EdgeSlice) -> SliceManifest:
        async with self._turn:
            return await asyncio.to_thread(edge_slice.manifest)

    async def file(self, partition: Partition, name: str) -> SliceFile:
        """Give one file's entry. Raises `PartitionNotAllowed`, `BadRequest` for a name that the slice does not have."""
        manifest = await self.manifest(partition)
        for file in manifest.files:
            if file.name == name:
                return file
        raise BadRequest(f"the slice has no such file; it has {', '.join(file.name for file in manifest.files)}")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `[start, stop)` of a file of `size` bytes."""

    start: int
    stop: int
    size: int

    @property
    def content_range(self) -> str:
        """The value of the Content-Range header."""
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


class RangeNotSatisfiable(Exception):
    """No byte of the file lies in the range asked for (RFC 9110, section 15.5.17)."""


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Read a Range header (RFC 9110, section 14.2); `None` means the whole file.

    Several ranges and other units are answered with the whole file, as the standard allows.
    Raises `RangeNotSatisfiable`.
    """
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size or start >= stop:
        raise RangeNotSatisfiable
    return ByteRange(start, stop, size)


def read_range(edge_slice: EdgeSlice, name: str, start: int, stop: int) -> Iterator[bytes]:
    """Stream bytes of one file; runs in a thread."""
    yield from edge_slice.read(name, start, stop)
