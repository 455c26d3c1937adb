"""Loading: only what a party holds, one copy of it, and refusals that name the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from safetensors.torch import load_file
from tiny_models import write_weights

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.errors import CheckpointError, UnsupportedModel, UsageError
from split_llama.load import load_embedding, load_head, load_segment, parse_device, parse_dtype

FP32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> Checkpoint:
    """Replace, add or (with None) drop tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors") | change
    write_weights(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return Checkpoint.open(folder)


def test_the_parts_of_fused_storage_are_the_checkpoint_s_tensors(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family="qwen2"))
    segment = load_segment(checkpoint, BlockRange(1, 3), **FP32)
    parts = dict(segment.stored_parts())
    assert set(parts) == {
        name for name in checkpoint.tensor_names if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    for name, view in parts.items():
        assert torch.equal(view, checkpoint.tensor(name)), name
    # One copy: the parts are views of as much storage as there are parameters, and no more.
    assert sum(view.numel() for view in parts.values()) == sum(p.numel() for p in segment.parameters())


def test_a_segment_reads_its_own_blocks_only(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    names = Checkpoint.open(folder).tensor_names
    others = [name for name in names if not name.startswith("model.layers.2.")]
    checkpoint = rewrite(folder, dict.fromkeys(others))
    assert len(dict(load_segment(checkpoint, BlockRange(2, 3), **FP32).stored_parts())) == 9
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\."):
        load_segment(checkpoint, BlockRange(1, 3), **FP32)


def test_a_tensor_of_the_wrong_shape_is_refused_with_both_shapes(tiny_checkpoint: TinyCheckpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = rewrite(tiny_checkpoint(), {name: torch.zeros(48, 31)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(48, 31\).*\(48, 32\)"):
        load_segment(checkpoint, BlockRange(0, 1), **FP32)


def test_a_tensor_without_a_place_is_refused_and_old_rotary_buffers_are_not(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    checkpoint = rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    load_segment(checkpoint, BlockRange(0, 1), **FP32)
    checkpoint = rewrite(folder, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(UnsupportedModel, match=r"self_attn\.q_proj\.bias has no place"):
        load_segment(checkpoint, BlockRange(0, 1), **FP32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32"])
def test_weights_take_the_dtype_asked_for(tiny_checkpoint: TinyCheckpoint, dtype: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(dtype=torch.bfloat16, tie=True))
    placed: dict[str, Any] = {"dtype": parse_dtype(dtype), "device": parse_device("cpu")}
    table = checkpoint.tensor("model.embed_tokens.weight")
    rows = load_embedding(checkpoint, **placed)(torch.arange(len(table)))
    assert rows.dtype == parse_dtype(dtype)
    assert torch.equal(rows, table.to(parse_dtype(dtype)))
    head = dict(load_head(checkpoint, **placed).stored_parts())
    assert torch.equal(head["lm_head.weight"], table.to(parse_dtype(dtype)))


def test_unknown_dtypes_and_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="float8"):
        parse_dtype("float8")
    with pytest.raises(UsageError, match="gpu"):
        parse_device("gpu")
