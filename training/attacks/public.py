"""What an attacker has: the public checkpoint, and which of its blocks ran before the rows were sent.

The server runs B on public base weights, and whoever has those has the rest of the checkpoint too: embedding, A, C and
head, and it knows A's adapter where a job shares it. What it lacks is the text and the noise's secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, ModelConfig
from split_llama.layers import Embedding, Segment
from split_llama.load import load_embedding, load_segment
from split_llama.lora import Adapter


class Attack(Protocol):
    """Reads token ids out of rows. A plug-in is made as `Class(public)`."""

    def recover(self, rows: Tensor) -> list[int]:
        """Give one token id per row of `rows [n, d]`, float32 on the CPU: those of one text, as the server decoded them
        after clipping, noise and codec, in order from position 0. The first one is BOS's, exact, where the model has
        one."""
        ...


@dataclass(frozen=True)
class PublicModel:
    """The weights that an attack knows, float32 on the CPU; `p` blocks ran before the rows were sent.

    `adapter` is what the attacker has of one, whole or in part; `None` for the public weights alone.
    """

    checkpoint: Checkpoint
    p: int
    adapter: Adapter | None = None

    @classmethod
    def open(cls, folder: Path, p: int, adapter: Adapter | None = None) -> PublicModel:
        """Open the checkpoint in `folder`. Raises `CheckpointError`, `UnsupportedModel`."""
        return cls(Checkpoint.open(folder), p, adapter)

    @property
    def config(self) -> ModelConfig:
        """The model's geometry."""
        return self.checkpoint.config

    @property
    def bos_token_id(self) -> int | None:
        """The token that every text begins with, if there is one: public, and no success to recover."""
        return self.checkpoint.generation_config().bos_token_id

    @cached_property
    def embedding(self) -> Embedding:
        """The token embedding."""
        return load_embedding(self.checkpoint, dtype=torch.float32, device=torch.device("cpu"))

    @cached_property
    def segment_a(self) -> Segment:
        """The first `p` blocks."""
        return self.blocks(BlockRange(0, self.p))

    def blocks(self, span: BlockRange) -> Segment:
        """Load blocks, B's and C's too, with the adapter's products added to their weights."""
        segment = load_segment(self.checkpoint, span, dtype=torch.float32, device=torch.device("cpu"))
        tensors = self.adapter.part(span).tensors if self.adapter is not None else {}
        for name, weight in segment.stored_parts():
            matrix = name.removesuffix(".weight")
            if self.adapter is not None and f"{matrix}.lora_A.weight" in tensors:
                down, up = (tensors[f"{matrix}.lora_{half}.weight"].float() for half in "AB")
                weight.data.add_(self.adapter.lora.scaling * up @ down)
        return segment
