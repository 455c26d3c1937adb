"""Fill a party's modules from a checkpoint, reading only the tensors they hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from split_llama.bare import BareBlock
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.errors import CheckpointError, UnsupportedModel, UsageError
from split_llama.layers import Block, Embedding, Head, Segment
from split_llama.products import Numerics

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


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
    """Load the blocks of one segment as dense matrices, their parts at hand under the checkpoint's names.

    Raises `CheckpointError` on a missing tensor or a wrong shape.
    """
    layers = (_load_block(checkpoint, index, dtype, device) for index in range(blocks.start, blocks.stop))
    return Segment(checkpoint.config, blocks, dtype=dtype, device=device, layers=layers)


def load_packed_segment(checkpoint: Checkpoint, blocks: BlockRange, numerics: Numerics) -> Segment:
    """Load the blocks of one segment for inference: each is packed before the next one takes memory."""
    compute, device = numerics.compute, numerics.device

    def packed_block(index: int) -> Block:
        block = _load_block(checkpoint, index, compute, device)
        block.pack(numerics)
        return block

    layers = [packed_block(index) for index in range(blocks.start, blocks.stop)]
    segment = Segment(checkpoint.config, blocks, dtype=compute, device=device, layers=layers)
    if device.type == "cpu":
        segment.forwards = [BareBlock(layer) for layer in layers]
    return segment


def _load_block(checkpoint: Checkpoint, index: int, dtype: torch.dtype, device: torch.device) -> Block:
    block = Block(checkpoint.config, dtype, device)
    _fill({f"model.layers.{index}.{name}": view for name, view in block.stored_parts()}, checkpoint)
    _refuse_leftovers(checkpoint, index, {name for name, _ in block.stored_parts()})
    return block


def load_embedding(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Embedding:
    """Load the token embedding; on a CPU its table stays in the file, as stored, and only the rows used are read."""
    table = checkpoint.tensor("model.embed_tokens.weight")
    _check_shape(checkpoint, "model.embed_tokens.weight", (checkpoint.config.vocab_size, checkpoint.config.hidden_size))
    return Embedding(table if device.type == "cpu" else table.to(device, dtype), dtype)


def load_head(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Head:
    """Load the final norm and the LM head as a dense matrix; where it is tied, from the embedding's table."""
    head = Head(checkpoint.config, dtype=dtype, device=device)
    parts = dict(head.stored_parts())
    _fill(
        {"model.norm.weight": parts["model.norm.weight"], _head_name(checkpoint): parts["lm_head.weight"]}, checkpoint
    )
    return head


def load_packed_head(checkpoint: Checkpoint, numerics: Numerics) -> Head:
    """Load the final norm and the LM head for inference, straight from the file: it is the largest matrix there is."""
    head = Head(checkpoint.config, dtype=numerics.compute, device=numerics.device)
    _fill({"model.norm.weight": head.norm.weight}, checkpoint)
    name = _head_name(checkpoint)
    _check_shape(checkpoint, name, (checkpoint.config.vocab_size, checkpoint.config.hidden_size))
    head.lm_head.pack(numerics, checkpoint.tensor(name))
    return head


def _head_name(checkpoint: Checkpoint) -> str:
    return "model.embed_tokens.weight" if checkpoint.config.tie_word_embeddings else "lm_head.weight"


def _fill(wanted: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Copy each named tensor into its view."""
    for name, view in wanted.items():
        _check_shape(checkpoint, name, tuple(view.shape))
        with torch.no_grad():
            view.copy_(checkpoint.tensor(name))


def _check_shape(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    found = checkpoint.info(name).shape
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} has shape {found}, config.json asks for {expected}; "
            "weights and config.json are not of one model"
        )


def _refuse_leftovers(checkpoint: Checkpoint, index: int, used: Set[str]) -> None:
    """Refuse tensors of a loaded block that found no place: leaving one out would change the maths silently."""
    prefix = f"model.layers.{index}."
    for name in sorted(checkpoint.tensor_names):
        # Old exports carry the rotary frequencies, which are computed here.
        if not name.startswith(prefix) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.removeprefix(prefix) not in used:
            family = checkpoint.config.model_type
            raise UnsupportedModel(f"{checkpoint.path}: the tensor {name} has no place in a {family} block")
