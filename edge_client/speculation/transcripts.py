"""Token ids of answers, kept for training a draft head where the user asked for it. They stay on this machine.

A file per model in the state folder, mode 0600: for each sequence its length, its ids and its length again, as
little-endian uint32, and nothing else: no time, no name. Token ids are the text for whoever has the tokenizer. The
oldest sequences go when the file gets large.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from edge_client.state_files import cache_errors, write_atomically
from split_llama.errors import CacheError

ITEM = np.dtype("<u4")
MOST_BYTES = 16 << 20


class TranscriptStore:
    """What was learnt from so far. Several processes may use it at once."""

    def __init__(self, states: Path, ends: str, *, most_bytes: int = MOST_BYTES) -> None:
        self._path = states / "transcripts" / f"{ends[:32]}.u32"
        self._most_bytes = most_bytes

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def append(self, tokens: Sequence[int]) -> None:
        """Add one sequence, if it is no larger than the store."""
        record = np.array([len(tokens), *tokens, len(tokens)], ITEM).tobytes()
        if not tokens or len(record) > self._most_bytes // 2:
            return
        with cache_errors("keep transcripts in"), self._locked():
            size = self._path.stat().st_size if self._path.exists() else 0
            if size + len(record) > self._most_bytes:
                write_atomically(self._path, b"".join(self._newest()))
            elif not self._ends_well(size):
                write_atomically(self._path, b"".join(self._records()))
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "ab") as file:
                file.write(record)

    def read(self) -> list[list[int]]:
        """Give all sequences, the oldest first."""
        with cache_errors("read transcripts in"), self._locked():
            return [np.frombuffer(record, ITEM)[1:-1].tolist() for record in self._records()]

    def clear(self) -> None:
        """Forget everything."""
        with cache_errors("remove transcripts in"), self._locked():
            self._path.unlink(missing_ok=True)

    def _ends_well(self, size: int) -> bool:
        """Whether the last sequence is whole: a process may have been killed while it wrote."""
        if size < 3 * ITEM.itemsize:
            return size == 0
        with self._path.open("rb") as file:
            file.seek(size - ITEM.itemsize)
            last = file.read(ITEM.itemsize)
            begin = size - ITEM.itemsize * (int.from_bytes(last, "little") + 2)
            if begin < 0:
                return False
            file.seek(begin)
            return file.read(ITEM.itemsize) == last

    def _newest(self) -> list[bytes]:
        """Give the newest sequences that fill at most half of the store."""
        kept: list[bytes] = []
        size = 0
        for record in reversed(self._records()):
            size += len(record)
            if size > self._most_bytes // 2:
                break
            kept.append(record)
        return kept[::-1]

    def _records(self) -> list[bytes]:
        content = self._path.read_bytes() if self._path.exists() else b""
        items = np.frombuffer(content, ITEM, count=len(content) // ITEM.itemsize)
        records = []
        at = 0
        while at < len(items):
            end = at + int(items[at]) + 2
            if end > len(items) or items[at] == 0 or items[end - 1] != items[at]:
                # The end of what a process wrote when it was killed, or another program's file.
                break
            records.append(items[at:end].tobytes())
            at = end
        if content and not records:
            raise CacheError(f"{self._path} cannot be read as transcripts; move it away to begin anew")
        return records

    def _locked(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(self._path.with_suffix(".lock"), mode=0o600)
