"""Fill a party's modules from a checkpoint, reading only the tensors they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from typing import Protocol

import torch
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.errors import CheckpointError, UnsupportedModel, UsageError
from split_llama.layers import Embedding, Head, Segment

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class _Stored(Protocol):
    def stored_parts(self) -> Iterator[tuple[str, Tensor]]: ...


def parse_dtype(name: str) -> torch.dtype:
    """Read a compute dtype by its name, long or short. Raises `UsageError`."""
    if name not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """Read "cpu", "cuda", "cuda:1"; "auto" takes CUDA where there is one. Raises `UsageError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device must be auto, cpu or cuda[:N]; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but this PyTorch sees no CUDA device; use --device cpu")
    return device


def set_up_cpu(threads: int | None) -> None:
    """Make this process ready to compute on a CPU, before it loads weights; `threads` of `None` is half of the cores.

    Two logical cores are mostly one physical core, and edge and server may share a machine. With small tensors, threads
    that wait for each other on busy cores cost far more than they give.
    """
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // 2))
    # Each token streams all weights: pages of 2 MiB spare address look-ups (one-row products run 15% faster). PyTorch
    # reads this at its first large allocation; it has no effect where the kernel has no such pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def load_segment(checkpoint: Checkpoint, blocks: BlockRange, *, dtype: torch.dtype, device: torch.device) -> Segment:
    """Load the blocks of one segment. Raises `CheckpointError` on a missing tensor or a wrong shape."""
    segment = Segment(checkpoint.config, blocks, dtype=dtype, device=device)
    _fill(segment, checkpoint)
    return segment


def load_embedding(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Embedding:
    """Load the token embedding."""
    embedding = Embedding(checkpoint.config, dtype=dtype, device=device)
    _fill(embedding, checkpoint)
    return embedding


def load_head(checkpoint: Checkpoint, embedding: Embedding, *, dtype: torch.dtype, device: torch.device) -> Head:
    """Load the final norm and the LM head; a tied head shares `embedding`'s storage."""
    tied = embedding if checkpoint.config.tie_word_embeddings else None
    head = Head(checkpoint.config, dtype=dtype, device=device, tied_to=tied)
    _fill(head, checkpoint)
    return head


def _fill(module: _Stored, checkpoint: Checkpoint) -> None:
    """Copy every stored part in, and refuse tensors of these blocks that the module has no place for."""
    wanted = dict(module.stored_parts())
    for name, view in wanted.items():
        tensor = checkpoint.tensor(name)
        if tensor.shape != view.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for "
                f"{tuple(view.shape)}; weights and config.json are not of one model"
            )
        with torch.no_grad():
            view.copy_(tensor)
    _refuse_leftovers(checkpoint, wanted.keys())


def _refuse_leftovers(checkpoint: Checkpoint, used: Set[str]) -> None:
    """Refuse tensors of the loaded blocks that found no place: leaving one out would change the maths silently."""
    blocks = {name.split(".")[2] for name in used if name.startswith("model.layers.")}
    for name in sorted(checkpoint.tensor_names - used):
        # Old exports carry the rotary frequencies, which are computed here.
        if not name.startswith("model.layers.") or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.split(".")[2] in blocks:
            family = checkpoint.config.model_type
            raise UnsupportedModel(f"{checkpoint.path}: the tensor {name} has no place in a {family} block")
