"""What a pass holds until its backward, estimated before it runs: who admits passes must know."""

from __future__ import annotations

from collections.abc import Collection

import torch

from split_llama.config import BlockRange, ModelConfig
from split_llama.lora import LoraConfig, lora_shapes

MASK_BYTES = 1


def input_bytes(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Give the bytes of one block's input: all that is held for a block that is computed once more."""
    return rows * config.hidden_size * dtype.itemsize


def graph_bytes(
    config: ModelConfig, lora: LoraConfig | None, *, rows: int, padded_rows: int, dropped_rows: int, dtype: torch.dtype
) -> int:
    """Estimate the bytes of one block's graph, weights not counted.

    Of `rows` rows, which attention pads to `padded_rows`, `dropped_rows` have dropout.
    """
    targets = () if lora is None else lora.target_modules
    per_padded_row = _attention_elements(config)
    per_row = _hidden_elements(config, targets) + _rank_elements(lora)
    elements = rows * per_row + padded_rows * per_padded_row
    return elements * dtype.itemsize + dropped_rows * _dropout_inputs(config, lora) * MASK_BYTES


def _hidden_elements(config: ModelConfig, targets: Collection[str]) -> int:
    """Inputs of both norms, what adapters read of activations, and of the MLP gate, up and SiLU of gate."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide = config.num_attention_heads * config.head_dim
    read = sum(not inputs.isdisjoint(targets) for inputs in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}))
    return (2 + read) * hidden + ("o_proj" in targets) * wide + (3 + ("down_proj" in targets)) * inner


def _attention_elements(config: ModelConfig) -> int:
    """Q, K and V as projected; Q and K turned; the result; a sum per head."""
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return (wide + 2 * narrow) + (wide + narrow) + wide + config.num_attention_heads


def _rank_elements(lora: LoraConfig | None) -> int:
    return 0 if lora is None else lora.r * len(lora.target_modules)


def _dropout_inputs(config: ModelConfig, lora: LoraConfig | None) -> int:
    """The inputs of all adapted matrices of a block, each of which has a mask."""
    if lora is None or not lora.dropout:
        return 0
    shapes = lora_shapes(config, lora, BlockRange(0, 1))
    return sum(inputs for name, (_, inputs) in shapes.items() if name.endswith("lora_A.weight"))
