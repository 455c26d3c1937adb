"""The safetensors header, read by hand: absolute byte offsets are what slices and byte-range downloads need.

Format (safetensors' own README): u64 little-endian header length, a JSON object of that length, then the bytes of the
tensors, which must cover the rest of the file without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from split_llama.errors import CheckpointError
from split_llama.json_file import brief, parse_json

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
SUPPORTED_DTYPES = ("F32", "BF16", "F16")
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: its stored dtype ("F32", "BF16", ...), and `nbytes` bytes from `offset` on in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def check_dtype(self, name: str) -> None:
        """Raise `CheckpointError` unless the stored dtype can be computed with here."""
        if self.dtype not in SUPPORTED_DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {name!r} is stored as {self.dtype}; supported: {', '.join(SUPPORTED_DTYPES)}. "
                "Use an unquantised version of this model"
            )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the header of one file and check it against the file's size; raise `CheckpointError` on anything foreign."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(LENGTH_BYTES)
            length = header_length(start, file)
            if LENGTH_BYTES + length > size:
                _truncated(file, size, LENGTH_BYTES + length)
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    tensors = parse_header(text, file)
    end = data_end(tensors, LENGTH_BYTES + length)
    if size < end:
        _truncated(file, size, end)
    if size > end:
        raise CheckpointError(f"{file} has {size - end} bytes after its last tensor: it is damaged; fetch it again")
    return tensors


def header_length(start: bytes, file: Path) -> int:
    """Length of the JSON header from a file's first 8 bytes."""
    length = int.from_bytes(start, "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is not a safetensors file: its first 8 bytes announce a header of {length} bytes "
            f"(2 to {MAX_HEADER_BYTES} are possible)"
        )
    return length


def parse_header(text: bytes, file: Path) -> dict[str, TensorInfo]:
    """Read the JSON header `text` of `file`; offsets become absolute. Tensors must follow each other without holes."""
    raw = parse_json(text, f"the header of {file}")
    base = LENGTH_BYTES + len(text)
    tensors = {name: _tensor_info(name, raw[name], file, base) for name in raw if name != "__metadata__"}
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise CheckpointError(f"{file}: tensor {name!r} begins at byte {info.offset} where byte {end} was expected")
        end += info.nbytes
    return tensors


def data_end(tensors: Mapping[str, TensorInfo], base: int) -> int:
    """First byte after the last tensor; `base` is where the data begins."""
    return max((info.offset + info.nbytes for info in tensors.values()), default=base)


def build_header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Give the first bytes (length and JSON) of a file that holds `tensors` in this order, 8-byte aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _tensor_info(name: str, entry: object, file: Path, base: int) -> TensorInfo:
    where = f"{file}: the header's entry for tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where} is malformed: dtype {brief(dtype)}, shape {brief(shape)}, data_offsets {brief(offsets)}"
        )
    begin, end = offsets
    if begin > end or (dtype in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[dtype]):
        raise CheckpointError(f"{where} gives bytes {begin} to {end}, which do not fit {dtype} of shape {shape}")
    return TensorInfo(dtype, tuple(shape), file, base + begin, end - begin)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _truncated(file: Path, size: int, wanted: int) -> NoReturn:
    raise CheckpointError(f"{file} is truncated: it has {size} bytes, its header promises {wanted}; fetch it again")
