"""A party's checkpoints of a job: one file each, put in place whole or not at all, the two newest kept.

A file holds tensors as safetensors does, and in its metadata one JSON text: whose it is, the step, what the party
wants to remember, and a digest of the tensors' bytes. A file that is torn, damaged or another job's counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor

from split_llama.errors import CacheError, CheckpointError, UsageError
from split_llama.json_file import brief, parse_json
from split_llama.safetensors_file import LENGTH_BYTES, read_header

KEPT = 2
_KEY = "fl_llama_checkpoint"
_NAME = re.compile(r"step-(\d{10})\.safetensors")
_UNFINISHED = ".new"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What was saved after a step: tensors on the CPU by name, and what JSON can say."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one party of one job, in a folder of its own.

    `owner` names job and party: files of another owner are neither read nor removed.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        """Use `folder`, made if there is none. Raises `CacheError` where that cannot be done."""
        self._folder = Path(folder)
        self._owner = owner
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f"step-*{_UNFINISHED}"):
                leftover.unlink()
        except OSError as error:
            raise CacheError(f"checkpoints cannot be kept in {self._folder}: {error.strerror or error}") from error

    def steps(self) -> list[int]:
        """Give the steps that can be restored, ascending; every byte of their files is checked."""
        return [step for step in self._named() if self._is_good(step)]

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of `step`. Raises `CheckpointError` if there is none, or it is not whole or not ours."""
        file = self._file(step)
        described = self._described(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        if _digest(data) != described["digest"]:
            raise CheckpointError(f"{file} is damaged: its content is not what was saved")
        return Checkpoint(step, decode(data), described["meta"])

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`, replacing one of the same step, and let go of all but the two newest.

        Returns when it is on the disk. Raises `CacheError` where that fails, as on a full disk: the older checkpoints
        are untouched then. `meta` is anything JSON can say.
        """
        if not 0 <= step < 10**10:
            raise UsageError(f"a checkpoint's step is a whole number from 0 to 9999999999; got {step}")
        file = self._file(step)
        unfinished = file.with_name(file.name + _UNFINISHED)
        data = self._encoded(step, tensors, meta)
        try:
            try:
                _write_through(unfinished, data)
                unfinished.replace(file)
                _sync_folder(self._folder)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(
                f"the checkpoint of step {step} ({len(data)} bytes) cannot be written to {self._folder}: "
                f"{error.strerror or error}. Older checkpoints are untouched; make room, or choose another folder"
            ) from error
        self._remove(self._ours()[:-KEPT])

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: a job that goes on from `step` will make them anew."""
        self._remove([later for later in self._ours() if later > step])

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:010}.safetensors"

    def _named(self) -> list[int]:
        matches = (_NAME.fullmatch(file.name) for file in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def _ours(self) -> list[int]:
        """The steps whose files are whole and ours, by their headers alone."""
        return [step for step in self._named() if self._header_is_good(step)]

    def _header_is_good(self, step: int) -> bool:
        try:
            self._described(self._file(step))
        except CheckpointError:
            return False
        return True

    def _is_good(self, step: int) -> bool:
        try:
            self.load(step)
        except CheckpointError:
            return False
        return True

    def _remove(self, steps: list[int]) -> None:
        try:
            for step in steps:
                self._file(step).unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(
                f"an old checkpoint in {self._folder} cannot be removed: {error.strerror or error}"
            ) from error

    def _encoded(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # The digest stands in the header, so it is of what follows the header.
        described = {"owner": self._owner, "step": step, "digest": _digest(encode(stored)), "meta": dict(meta)}
        return encode(stored, metadata={_KEY: json.dumps(described)})

    def _described(self, file: Path) -> dict[str, Any]:
        """Read what a file says of itself. Raises `CheckpointError` unless it is whole, by its size, and ours."""
        read_header(file)
        text = _metadata(file).get(_KEY)
        described = parse_json(text.encode(), f"{file}, {_KEY}") if isinstance(text, str) else {}
        step, owner = described.get("step"), described.get("owner")
        if owner != self._owner or type(step) is not int or file != self._file(step):
            raise CheckpointError(
                f"{file} is no checkpoint of {self._owner}: it names {brief(owner)}, step {brief(step)}"
            )
        if not isinstance(described.get("meta"), dict) or not isinstance(described.get("digest"), str):
            raise CheckpointError(f"{file} lacks what a checkpoint says of itself")
        return described


def _metadata(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            text = stream.read(int.from_bytes(stream.read(LENGTH_BYTES), "little"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    metadata = parse_json(text, str(file)).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _digest(data: bytes) -> str:
    """SHA-256 (hex) of the tensors in a safetensors file: of all that follows its header."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    return hashlib.sha256(memoryview(data)[LENGTH_BYTES + length :]).hexdigest()


def _write_through(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power failure, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
