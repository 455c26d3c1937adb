"""The part of a checkpoint that an edge needs, as virtual files that a server streams and an edge checks.

A slice is a checkpoint folder of its own: config, tokenizer and one model.safetensors with the embedding, the blocks of
segments A and C, the final norm and the head. Nothing is copied: model.safetensors is put together while it is read.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from split_llama.checkpoint import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    Checkpoint,
    holds_blocks,
)
from split_llama.config import ModelConfig, Partition
from split_llama.errors import BadRequest, CheckpointError
from split_llama.json_file import brief
from split_llama.safetensors_file import build_header

PIECE_BYTES = 1 << 20
COPIED_FILES = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)
REQUIRED_FILES = (CONFIG_FILE, "tokenizer.json", WEIGHTS_FILE)
_MAX_COPIED_BYTES = 1 << 28
_MAX_WEIGHTS_BYTES = 1 << 42


@dataclass(frozen=True, slots=True)
class SliceFile:
    """One virtual file: its name, its size in bytes and the SHA-256 (hex) of its content."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SliceManifest:
    """What a slice consists of. `digest` is `weights_digest`; it does not depend on how the checkpoint is stored."""

    partition: Partition
    files: tuple[SliceFile, ...]
    digest: str
    tokenizer_digest: str

    def to_json(self) -> dict[str, Any]:
        """Give the manifest as a JSON object."""
        files = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in self.files]
        return {
            "partition": [self.partition.p, self.partition.q],
            "files": files,
            "digest": self.digest,
            "tokenizer_digest": self.tokenizer_digest,
        }

    @classmethod
    def from_json(cls, raw: object) -> SliceManifest:
        """Read a manifest that a server sent; it is not trusted. Raises `CheckpointError`.

        Names come from a fixed set of plain file names, sizes are bounded, digests are SHA-256 in lower-case hex.
        """
        fields = _object(raw, ("partition", "files", "digest", "tokenizer_digest"), "the manifest")
        if not isinstance(fields["files"], list):
            raise CheckpointError(f"the server's slice manifest: files must be a list, got {brief(fields['files'])}")
        files = tuple(_slice_file(entry) for entry in fields["files"])
        names = [file.name for file in files]
        if len(set(names)) < len(names) or not set(REQUIRED_FILES) <= set(names):
            raise CheckpointError(
                f"the server's slice manifest: files must name each of {', '.join(REQUIRED_FILES)} once, got {names}"
            )
        return cls(
            partition=_partition(fields["partition"]),
            files=files,
            digest=_digest(fields["digest"], "digest"),
            tokenizer_digest=_digest(fields["tokenizer_digest"], "tokenizer_digest"),
        )


class EdgeSlice:
    """The files an edge of `partition` needs, over a full checkpoint. Immutable; reading is thread-safe.

    `manifest()` hashes all bytes of the slice on its first call (about a second per gigabyte): call it from a worker.
    """

    def __init__(self, checkpoint: Checkpoint, partition: Partition) -> None:
        self._checkpoint = checkpoint
        self.partition = partition
        names = edge_tensor_names(checkpoint, partition)
        # Wide types first, as the safetensors library orders them: every tensor stays aligned.
        self._names = sorted(names, key=lambda name: (checkpoint.info(name).dtype != "F32", name))
        self._header = build_header({name: checkpoint.info(name) for name in self._names})
        self._ends = [len(self._header)]
        for name in self._names:
            self._ends.append(self._ends[-1] + checkpoint.info(name).nbytes)
        self._sizes = {WEIGHTS_FILE: self._ends[-1]}
        for name in COPIED_FILES:
            if (checkpoint.path / name).is_file():
                self._sizes[name] = (checkpoint.path / name).stat().st_size
        if "tokenizer.json" not in self._sizes:
            raise CheckpointError(
                f"{checkpoint.path} has no tokenizer.json, which an edge needs; make one with transformers "
                "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
            )

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes in bytes of the virtual files, by name; known without hashing."""
        return dict(self._sizes)

    def manifest(self) -> SliceManifest:
        """Give names, sizes and digests."""
        return self._manifest

    @cached_property
    def _manifest(self) -> SliceManifest:
        whole, digests = hashlib.sha256(self._header), {}
        for name in self._names:
            digests[name] = _hash_tensor(self._checkpoint, name, whole)
        return SliceManifest(
            partition=self.partition,
            files=tuple(
                SliceFile(name, size, whole.hexdigest() if name == WEIGHTS_FILE else self._hash_file(name))
                for name, size in sorted(self._sizes.items())
            ),
            digest=_combine(self._checkpoint, digests),
            tokenizer_digest=tokenizer_digest(self._checkpoint.path),
        )

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Stream bytes `[start, stop)` of a virtual file in pieces of at most 1 MiB.

        Raises `BadRequest` at once for a file or range that does not exist, `CheckpointError` while streaming.
        """
        if name not in self._sizes:
            raise BadRequest(f"the slice has no file {brief(name)}; it has {', '.join(sorted(self._sizes))}")
        if not 0 <= start <= stop <= self._sizes[name]:
            raise BadRequest(f"{name} has {self._sizes[name]} bytes; the range {start} to {stop} is not within it")
        return self._read_weights(start, stop) if name == WEIGHTS_FILE else self._read_file(name, start, stop)

    def _read_weights(self, start: int, stop: int) -> Iterator[bytes]:
        if start < min(stop, len(self._header)):
            yield self._header[start : min(stop, len(self._header))]
        # Tensor i lies at [ends[i], ends[i + 1]); the first one that ends after `start` is where reading begins.
        for index in range(max(0, bisect.bisect_right(self._ends, start) - 1), len(self._names)):
            begin, end = self._ends[index], self._ends[index + 1]
            if begin >= stop:
                return
            yield from self._checkpoint.read_bytes(
                self._names[index], max(start, begin) - begin, min(stop, end) - begin, PIECE_BYTES
            )

    def _read_file(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        file = self._checkpoint.path / name
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                for at in range(start, stop, PIECE_BYTES):
                    data = stream.read(min(PIECE_BYTES, stop - at))
                    if len(data) < min(PIECE_BYTES, stop - at):
                        raise CheckpointError(f"{file} became shorter while the model was served")
                    yield data
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error

    def _hash_file(self, name: str) -> str:
        digest = hashlib.sha256()
        for data in self._read_file(name, 0, self._sizes[name]):
            digest.update(data)
        return digest.hexdigest()


def edge_tensor_filter(config: ModelConfig, partition: Partition) -> Callable[[str], bool]:
    """Say of a tensor's name whether an edge of `partition` needs it: what `hub.fetch_model` takes.

    A tied head is the embedding, so `lm_head.weight` is left out then, even where the checkpoint stores it.
    """
    num_blocks = config.num_hidden_layers
    in_a = holds_blocks(partition.segment_a(num_blocks))
    in_c = holds_blocks(partition.segment_c(num_blocks))
    ends = _end_tensors(config)
    return lambda name: name in ends or in_a(name) or in_c(name)


def edge_tensor_names(checkpoint: Checkpoint, partition: Partition) -> tuple[str, ...]:
    """Give the names of the edge's tensors, sorted; raises `CheckpointError` where one is missing altogether."""
    wanted = edge_tensor_filter(checkpoint.config, partition)
    for name in _end_tensors(checkpoint.config):
        checkpoint.info(name)
    num_blocks = checkpoint.config.num_hidden_layers
    for blocks in (partition.segment_a(num_blocks), partition.segment_c(num_blocks)):
        for block in range(blocks.start, blocks.stop):
            checkpoint.info(f"model.layers.{block}.input_layernorm.weight")
    return tuple(sorted(name for name in checkpoint.tensor_names if wanted(name)))


def weights_digest(checkpoint: Checkpoint, partition: Partition) -> str:
    """SHA-256 (hex) over a line `name dtype shape sha256(bytes)` for each of the edge's tensors, sorted by name.

    A full checkpoint, a sharded one and a slice folder give the same digest.
    """
    names = edge_tensor_names(checkpoint, partition)
    return _combine(checkpoint, {name: _hash_tensor(checkpoint, name) for name in names})


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 (hex) of tokenizer.json, which alone decides the token ids."""
    file = folder / "tokenizer.json"
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _end_tensors(config: ModelConfig) -> tuple[str, ...]:
    head = () if config.tie_word_embeddings else ("lm_head.weight",)
    return ("model.embed_tokens.weight", "model.norm.weight", *head)


def _hash_tensor(checkpoint: Checkpoint, name: str, *also: hashlib._Hash) -> str:
    """SHA-256 (hex) of a tensor's stored bytes, which are fed to the digests `also` too."""
    digest = hashlib.sha256()
    for data in checkpoint.read_bytes(name, 0, checkpoint.info(name).nbytes, PIECE_BYTES):
        for each in (digest, *also):
            each.update(data)
    return digest.hexdigest()


def _combine(checkpoint: Checkpoint, digests: Mapping[str, str]) -> str:
    whole = hashlib.sha256()
    for name in sorted(digests):
        info = checkpoint.info(name)
        shape = ",".join(map(str, info.shape))
        whole.update(f"{name} {info.dtype} {shape} {digests[name]}\n".encode())
    return whole.hexdigest()


def _object(raw: object, keys: tuple[str, ...], what: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping) or set(raw) != set(keys):
        raise CheckpointError(f"the server's slice manifest: {what} must have {', '.join(keys)}, got {brief(raw)}")
    return raw


def _slice_file(raw: object) -> SliceFile:
    entry = _object(raw, ("name", "size", "sha256"), "a file")
    name, size = entry["name"], entry["size"]
    if name not in (*COPIED_FILES, WEIGHTS_FILE):
        raise CheckpointError(f"the server's slice manifest names the file {brief(name)}, which is no part of a slice")
    limit = _MAX_WEIGHTS_BYTES if name == WEIGHTS_FILE else _MAX_COPIED_BYTES
    if type(size) is not int or not 0 <= size <= limit:
        raise CheckpointError(f"the server's slice manifest: {name} must have 0 to {limit} bytes, got {brief(size)}")
    return SliceFile(name, size, _digest(entry["sha256"], f"sha256 of {name}"))


def _digest(value: object, what: str) -> str:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value
    raise CheckpointError(f"the server's slice manifest: {what} must be 64 lower-case hex digits, got {brief(value)}")


def _partition(value: object) -> Partition:
    if isinstance(value, list) and len(value) == 2 and all(type(item) is int and 0 <= item < 2**16 for item in value):
        return Partition(*value)
    raise CheckpointError(f"the server's slice manifest: partition must be two block counts [p, q], got {brief(value)}")
