"""The partition that was chosen for a model on a device, kept in the state folder.

Another partition is a second release of every row (see Noise in the design): so a choice stays until `plan` runs again,
however the link and the load of the machine change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from edge_client.rest import ModelCard
from edge_client.state_files import cache_errors, write_atomically
from split_llama.config import Partition
from split_llama.errors import FlLlamaError


@dataclass(frozen=True, slots=True)
class Remembered:
    """A choice, and why it was made, in words."""

    partition: Partition
    reason: str


class ChoiceMemory:
    """Keeps one choice for each model, hosted blocks and device. `weights` is the digest of the model's least slice."""

    def __init__(self, states: Path, card: ModelCard, weights: str, device: str) -> None:
        facts = [card.geometry, weights, card.blocks.start, card.blocks.stop, device]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        self._card = card
        self._path = states / "plans" / f"{name}.json"

    @contextlib.contextmanager
    def choosing(self) -> Iterator[None]:
        """Keep other processes from choosing at the same time: they might come to something else."""
        with cache_errors("remember the plan in"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._path.with_suffix(".lock"))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def load(self) -> Remembered | None:
        """Give what was chosen; nothing if the file is missing or broken, or the server would not have it."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, FlLlamaError):
            raw = json.loads(self._path.read_bytes())
            partition = Partition.parse(raw["partition"])
            self._card.check_partition(partition)
            if partition.p > 0:
                return Remembered(partition, str(raw["reason"]))
        return None

    def save(self, choice: Remembered) -> None:
        """Keep a choice in place of the one before. Raises `CacheError`."""
        content = json.dumps({"partition": str(choice.partition), "reason": choice.reason}, indent=1)
        with cache_errors("remember the plan in"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, content.encode())
