"""A client's parts of the model in training: embedding and A before the wire; C, norm, head and the loss behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.layers import Embedding, Head
from split_llama.load import load_embedding, load_head, load_segment
from split_llama.lora import LoraConfig, init_lora
from training.compute.batch import Batch
from training.compute.lora import DropoutKey, Group, recording
from training.compute.tape import Tape, Trunk, finish

# Logits (float32) are computed for so many elements at a time, 64 MiB.
LOGITS_AT_ONCE = 2**24


class Loss(NamedTuple):
    """The loss of a batch, as the sum of its tokens' cross-entropies, and dL/dh_B `[N, D]` of that sum."""

    loss_sum: float
    targets: int
    grad: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """Embedding, A, C and head, dense; adapters' weights come with every call, A's and C's in one mapping.

    With `recompute` the graphs of A and C are not kept: their backward computes each block once more.
    """

    embedding: Embedding
    a: Trunk
    c: Trunk
    head: Head
    recompute: bool = False

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        partition: Partition,
        lora: LoraConfig,
        segments: Collection[str] = ("A", "C"),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a device is a value
        recompute: bool = False,
    ) -> Ends:
        """Load both ends of a model. `segments` says which of them have adapters; "B" in it changes nothing here.

        Raises `UsageError` for a partition that leaves nothing between them, and `CheckpointError`.
        """
        blocks = checkpoint.config.num_hidden_layers

        def trunk(name: str, span: BlockRange) -> Trunk:
            segment = load_segment(checkpoint, span, dtype=dtype, device=device)
            return Trunk(segment, lora if name in segments else None)

        return cls(
            embedding=load_embedding(checkpoint, dtype=dtype, device=device),
            a=trunk("A", partition.segment_a(blocks)),
            c=trunk("C", partition.segment_c(blocks)),
            head=load_head(checkpoint, dtype=dtype, device=device),
            recompute=recompute,
        )

    def first_weights(self, seed: int) -> dict[str, Tensor]:
        """Give the adapters' first values, float32; they follow from `seed`."""
        config = self.a.segment.config
        weights: dict[str, Tensor] = {}
        for trunk in (self.a, self.c):
            if trunk.lora is not None:
                weights |= init_lora(config, trunk.lora, trunk.segment.blocks, seed)
        return weights

    def forward_a(
        self, batch: Batch, weights: Mapping[str, Tensor], dropout: DropoutKey | None
    ) -> tuple[Tensor, Tape | None]:
        """Give A's output `[N, D]` and the tape that its backward needs, `None` where nothing in A is trained."""
        with recording(graph=False):
            rows = self.embedding(batch.token_ids.to(self.a.segment.device))
        trains = self.a.lora is not None and bool(weights) and len(self.a.segment.blocks) > 0
        keep = trains and not self.recompute
        tape = finish(self.a.forward(rows, [_group(batch, weights, dropout)], keep=keep))
        return tape.output, tape if trains else None

    def loss(self, states: Tensor, batch: Batch, weights: Mapping[str, Tensor], dropout: DropoutKey | None) -> Loss:
        """Run B's output `[N, D]` through C and the head, and back; the gradients of C's leaves add to their `.grad`.

        The head runs only on rows that have a target. A batch without any gives a loss of 0 and a gradient of zeros.
        """
        rows, wanted = (tensor.to(self.c.segment.device) for tensor in batch.targets())
        if not len(rows):
            return Loss(0.0, 0, torch.zeros_like(states))
        tape = finish(self.c.forward(states, [_group(batch, weights, dropout)], keep=not self.recompute))
        total, grad = self._through_head(tape.output, rows, wanted, backward=True)
        return Loss(total, len(rows), finish(tape.backward(grad)))

    def score(self, states: Tensor, batch: Batch, weights: Mapping[str, Tensor]) -> tuple[float, int]:
        """Give the loss sum and the number of targets alone, without dropout: for evaluation."""
        rows, wanted = (tensor.to(self.c.segment.device) for tensor in batch.targets())
        tape = finish(self.c.forward(states, [_group(batch, weights, None)], keep=False))
        return self._through_head(tape.output, rows, wanted, backward=False)[0], len(rows)

    def backward_a(self, tape: Tape | None, grad: Tensor) -> None:
        """Take dL/dh_A `[N, D]` back through A; the gradients of its leaves add to their `.grad`."""
        if tape is not None:
            finish(tape.backward(grad))

    def _through_head(self, states: Tensor, rows: Tensor, wanted: Tensor, *, backward: bool) -> tuple[float, Tensor]:
        """Give the summed loss of `rows`, and with `backward` its gradient `[N, D]`: zeros for all other rows."""
        at_once = max(1, LOGITS_AT_ONCE // self.a.segment.config.vocab_size)
        total = 0.0
        with recording(graph=backward):
            grad = torch.zeros_like(states)
            for some_rows, some_wanted in zip(torch.split(rows, at_once), torch.split(wanted, at_once), strict=True):
                some = states[some_rows].requires_grad_(backward)
                loss = F.cross_entropy(self.head(some), some_wanted, reduction="sum")
                if backward:
                    grad[some_rows] = torch.autograd.grad(loss, some)[0]
                total += float(loss.detach())
        return total, grad


def _group(batch: Batch, weights: Mapping[str, Tensor], dropout: DropoutKey | None) -> Group:
    return Group(batch.ragged.lengths, weights, dropout)
