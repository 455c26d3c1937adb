"""A Hugging Face checkpoint folder: which tensors it holds, where they lie, and reading only those that are asked for.

`split_llama.hub` finds or fetches the folder of a MODEL; this module opens it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from split_llama.config import BlockRange, ModelConfig
from split_llama.errors import CheckpointError
from split_llama.generation_config import GenerationDefaults
from split_llama.json_file import brief, read_json
from split_llama.safetensors_file import TensorInfo, read_header

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What a party needs beside the weights, as far as the checkpoint has it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

MAX_BLOCKS = 4096

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint folder. It holds no file open: tensors are mapped one by one and unmapped with their last use.

    The files must not be rewritten while it is in use.
    """

    path: Path
    raw_config: Mapping[str, Any]
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read config.json and the safetensors headers of the folder `path`.

        Raises `CheckpointError` (missing, truncated or foreign files) and `UnsupportedModel`.
        """
        folder = Path(path)
        check_folder(folder)
        raw, config = read_config(folder)
        return cls(folder, raw, config, _read_headers(folder))

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors here."""
        return frozenset(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; raises `CheckpointError` if there is none of this name."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} ({len(self.tensors)} others): the files are incomplete, or the "
                "weights belong to another model than config.json"
            )
        return self.tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and shape, on the CPU, memory-mapped; writing to it never reaches the file.

        A mapping holds a file descriptor while the tensor lives: copy what is to be kept.
        """
        info = self.info(name)
        info.check_dtype(name)
        dtype = _TORCH_DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with info.file.open("rb") as stream:
                # Copy-on-write: PyTorch has no read-only tensors. Only this tensor is mapped, so that no reservation
                # of a whole file's size is needed.
                length = info.offset + info.nbytes - start
                mapped = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read: {error}") from error
        flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(info.shape), offset=info.offset - start)
        # A header of odd length leaves tensors misaligned, which vectorised kernels may not expect.
        return (flat if info.offset % flat.itemsize == 0 else flat.clone()).view(info.shape)

    def read_bytes(self, name: str, start: int, stop: int, piece: int = 1 << 20) -> Iterator[bytes]:
        """Stream bytes `[start, stop)` of a tensor as stored, in pieces of at most `piece` bytes."""
        info = self.info(name)
        try:
            with info.file.open("rb") as stream:
                stream.seek(info.offset + start)
                for at in range(start, stop, piece):
                    data = stream.read(min(piece, stop - at))
                    if len(data) < min(piece, stop - at):
                        raise CheckpointError(f"{info.file} became shorter while it was read; fetch it again")
                    yield data
        except OSError as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read: {error}") from error

    def generation_config(self) -> GenerationDefaults:
        """Stop tokens and sampling defaults; raises `CheckpointError` if they are malformed."""
        file = self.path / GENERATION_FILE
        return GenerationDefaults.from_hf(read_json(file) if file.exists() else {}, self.raw_config)


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Read config.json: as it is, and understood. Raises `CheckpointError`, `UnsupportedModel`."""
    raw = read_json(folder / CONFIG_FILE)
    blocks = raw.get("num_hidden_layers")
    if isinstance(blocks, int) and blocks > MAX_BLOCKS:  # some fields become one entry per block
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: num_hidden_layers is {brief(blocks)}; at most {MAX_BLOCKS} blocks are supported"
        )
    try:
        return raw, ModelConfig.from_hf(raw)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: a field has a value of the wrong type ({error})") from error


def holds_blocks(blocks: BlockRange) -> Callable[[str], bool]:
    """Say of a tensor's name whether it belongs to one of `blocks`."""
    prefixes = tuple(f"model.layers.{block}." for block in range(blocks.start, blocks.stop))
    # Old exports carry the rotary frequencies, which are computed here.
    return lambda name: name.startswith(prefixes) and not name.endswith("rotary_emb.inv_freq")


def check_folder(folder: Path) -> None:
    """Raise `CheckpointError` unless `folder` is a folder with config.json; other formats are refused by name."""
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder}: GGUF files are not supported; give a folder with a safetensors checkpoint")
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the safetensors files")
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: there is no such folder; check the path, or give a hub id such as ORG/NAME")
    if not os.path.isfile(folder / CONFIG_FILE):
        raise CheckpointError(
            f"{folder} has no config.json, so it is no Hugging Face checkpoint{_other_format(folder)}"
        )


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index file: tensor name to the plain name of the shard that holds it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: it is not a safetensors index; fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {shard!r}; the plain name of a .safetensors file in the "
                "same folder was expected"
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Say whether `name` can only be a visible file directly in a folder, on every system."""
    return bool(name) and not name.startswith(".") and not set(name) & set('/\\:\0<>|?*"') and name.isprintable()


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{_other_format(folder)}")
        return read_header(folder / WEIGHTS_FILE)
    weight_map = read_weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks {shard}, which {INDEX_FILE} names: fetch the missing file")
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: both {tensors[name].file.name} and {shard} hold the tensor {name!r}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{folder}: {INDEX_FILE} says that {shard} holds {name!r}, but it does not")
    return tensors


def _other_format(folder: Path) -> str:
    """What else lies there and why it is not taken, to end an error message with."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f". It cannot be listed: {error.strerror or error}"
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf:
        return f". {gguf} is a GGUF file, which is not supported; get the safetensors version of this model"
    pickled = next((name for name in names if name.endswith(_PICKLED_SUFFIXES)), None)
    if pickled:
        return (
            f". {pickled} holds pickled weights, which can run code when they are opened and are never loaded; "
            "get the safetensors version of this model, or convert it where you trust it"
        )
    return ". A checkpoint is config.json with model.safetensors (or shards and their index)"
