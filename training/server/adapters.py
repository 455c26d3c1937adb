"""Which adapters a job's server holds: B's, and where all are shared A's and C's; their names, shapes, first values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from split_llama.adapter_file import encode_tensors
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.lora import LoraConfig, init_lora, lora_shapes
from training.job_config import JobConfig

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Shapes by name: `trunk` are those of B, `ends` those of A and then C where the server has them too."""

    model: ModelConfig
    lora: LoraConfig
    blocks: BlockRange
    trunk: Shapes
    ends: Shapes
    _parts: tuple[BlockRange, ...]

    @classmethod
    def of(cls, model: ModelConfig, config: JobConfig) -> AdapterPlan:
        """Read a job. Raises `UsageError` for a partition that leaves no block to the server."""
        lora, partition, layers = config.lora.config, Partition.parse(config.partition), model.num_hidden_layers
        blocks = partition.segment_b(layers)
        spans = {"A": partition.segment_a(layers), "C": partition.segment_c(layers)}
        ends = [span for name, span in spans.items() if config.shares_all and name in config.lora.segments]
        trunk = [blocks] if "B" in config.lora.segments else []
        return cls(
            model,
            lora,
            blocks,
            {name: shape for span in trunk for name, shape in lora_shapes(model, lora, span).items()},
            {name: shape for span in ends for name, shape in lora_shapes(model, lora, span).items()},
            (*trunk, *ends),
        )

    def first(self, seed: int) -> dict[str, Tensor]:
        """Give the first values of all, float32 on the CPU."""
        return {
            name: value for span in self._parts for name, value in init_lora(self.model, self.lora, span, seed).items()
        }

    @property
    def end_rows(self) -> int:
        """How many rows of the wire the adapters of A and C take."""
        return -(-sum(math.prod(shape) for shape in self.ends.values()) // self.model.hidden_size)

    def file(self, tensors: Mapping[str, Tensor], base_model: str, step: int) -> bytes:
        """Give adapters as one safetensors file, with their configuration and step in its metadata."""
        config = json.dumps(self.lora.to_peft(base_model))
        return encode_tensors(tensors, {"adapter_config": config, "step": str(step)})
