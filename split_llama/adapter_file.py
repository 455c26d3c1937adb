"""The bytes of an adapter's weights: a safetensors file with PEFT's names, read without trust and written whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from split_llama.errors import AdapterMismatch, CheckpointError
from split_llama.json_file import parse_json
from split_llama.safetensors_file import LENGTH_BYTES, header_length, parse_header

# What PEFT writes before a tensor's own name.
PREFIX = "base_model.model."


def block_of(name: str) -> int:
    """Give the block that a tensor's name names. Raises `AdapterMismatch` for a name that is not one of ours."""
    parts = name.split(".")
    if name.startswith("model.layers.") and len(parts) > 3 and parts[2].isascii() and parts[2].isdigit():
        return int(parts[2][:9])
    raise AdapterMismatch(
        f"the adapter's tensor {name!r} belongs to no block; "
        "names such as model.layers.0.self_attn.q_proj.lora_A.weight were expected"
    )


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Give the file of `tensors` by their own names."""
    stored = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save_tensors(stored, metadata={"format": "pt", **metadata})


def decode_tensors(data: bytes, source: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read a file's tensors, by their own names and as stored, and its metadata; `source` names it in errors.

    Raises `CheckpointError` for damaged files and `AdapterMismatch` for tensors that are no adapter's.
    """
    file = Path(source)
    base = LENGTH_BYTES + header_length(data[:LENGTH_BYTES], file)
    infos = parse_header(data[LENGTH_BYTES:base], file)
    for name, info in infos.items():
        info.check_dtype(name)
        if not name.startswith(PREFIX):
            raise AdapterMismatch(f"{source}: the tensor {name!r} is not named as PEFT names those of an adapter")
        block_of(name.removeprefix(PREFIX))
    promised = base + sum(info.nbytes for info in infos.values())
    if promised != len(data):
        raise CheckpointError(f"{source} is damaged: its header promises {promised} bytes, it has {len(data)}")
    metadata = parse_json(data[LENGTH_BYTES:base], source).get("__metadata__")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_tensors(data).items()}
    return tensors, metadata if isinstance(metadata, dict) else {}


def replace_file(file: Path, content: bytes) -> None:
    """Put `content` in the place of `file`, all of it or nothing. Raises `OSError`."""
    beside = file.with_name(f".{file.name}.new")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
