"""A model's own geometry with random weights, in memory: to measure a share of it that nobody has fetched yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.layers import Block, Head
from split_llama.safetensors_file import TensorInfo

PLACE = Path("random-weights")
EMBEDDING = "model.embed_tokens.weight"
# One stretch of normal numbers, repeated: a product's speed does not depend on what the numbers are.
STRETCH = 2**20


class RandomCheckpoint(Checkpoint):
    """Gives random tensors of the shapes that the geometry asks for."""

    @classmethod
    def of(cls, raw: Mapping[str, Any], config: ModelConfig, partition: Partition) -> RandomCheckpoint:
        """Make the share of `partition`; `raw` is the parsed config.json."""
        count = config.num_hidden_layers
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
        meta = torch.device("meta")
        shapes |= _shapes(Head(config, dtype=torch.bfloat16, device=meta))
        for segment in (partition.segment_a(count), partition.segment_c(count)):
            shapes |= _block_shapes(config, segment)
        tensors = {
            name: TensorInfo("BF16", shape, PLACE, 0, 2 * math.prod(shape)) for name, shape in sorted(shapes.items())
        }
        return cls(PLACE, raw, config, tensors)

    def tensor(self, name: str) -> Tensor:
        """Make the tensor. The embedding's rows are all one row, which takes no room."""
        shape = self.info(name).shape
        generator = torch.Generator().manual_seed(0)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        if name == EMBEDDING and not self.config.tie_word_embeddings:
            return torch.randn(1, shape[1], generator=generator).bfloat16().expand(shape)
        count = math.prod(shape)
        stretch = (torch.randn(min(count, STRETCH), generator=generator) / math.sqrt(shape[1])).bfloat16()
        return stretch.repeat(-(-count // len(stretch)))[:count].view(shape)


def _block_shapes(config: ModelConfig, blocks: BlockRange) -> dict[str, tuple[int, ...]]:
    block = _shapes(Block(config, torch.bfloat16, torch.device("meta")))
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(blocks.start, blocks.stop)
        for name, shape in block.items()
    }


def _shapes(part: Block | Head) -> dict[str, tuple[int, ...]]:
    return {name: tuple(view.shape) for name, view in part.stored_parts()}
