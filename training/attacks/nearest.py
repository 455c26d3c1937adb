"""Nearest embedding: each row is taken for the token whose embedding it lies closest to."""

from __future__ import annotations

import torch
from torch import Tensor

from training.attacks.public import PublicModel


class NearestEmbedding:
    """Knows the embedding table only. Blocks that add little to their input leave the token where it was."""

    def __init__(self, public: PublicModel) -> None:
        self._embedding = public.embedding

    @torch.inference_mode()
    def recover(self, rows: Tensor) -> list[int]:
        """Give the closest token of each row of `rows [n, d]`."""
        found: list[int] = torch.cdist(rows, self._embedding.weight.float()).argmin(dim=-1).tolist()
        return found
