"""A client's computing for one micro-batch: A and noise, C with the loss, A's backward; rows as they go on the wire.

All of it belongs to the thread that computes. Shapes: N rows of a batch, d hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from split_llama.lora import Adapter, LoraConfig
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.training import Message
from training.client.privacy import GradientNoise, Released, StateNoise, adapter_digest
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.compute.lora import DropoutKey
from training.compute.tape import Tape
from training.job_config import JobConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Which micro-batch of which step this is, and of whom: what everything random in it follows from."""

    client: str
    step: int
    micro: int


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A micro-batch whose states are on their way: what its loss and its backward need, and the encoded states."""

    batch: Batch
    leaves: Mapping[str, Tensor]
    dropout: DropoutKey | None
    released: Released
    tape: Tape | None
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The loss of a micro-batch, summed over `targets` tokens, and the encoded gradient; neither if not finite."""

    loss: float | None
    targets: int
    data: bytes | None


class ClientMaths:
    """Both ends of the model with what protects them."""

    def __init__(
        self, ends: Ends, config: JobConfig, noise: StateNoise, gradient_noise: GradientNoise, width: int
    ) -> None:
        self.ends = ends
        self.noise = noise
        self._gradient_noise = gradient_noise
        self._config = config
        self._width = width
        self.codec = Codec.parse(config.codec)
        self.gradient_codec = Codec.parse(config.gradient_codec)

    def adapter(self, weights: Mapping[str, Tensor]) -> str:
        """Name A's adapter for the noise; "" where it does nothing, or nobody asks."""
        lora: LoraConfig | None = self.ends.a.lora
        if lora is None or not self.noise.spec.is_on:
            return ""
        part = Adapter(lora, weights).part(self.ends.a.segment.blocks)
        return adapter_digest(lora, {name: tensor.detach() for name, tensor in part.tensors.items()})

    def forward(self, batch: Batch, weights: Mapping[str, Tensor], adapter: str, place: Place) -> Sent:
        """Run A and make the rows to send. Raises `NonFiniteStates`."""
        config, device = self._config, self.ends.a.segment.device
        # Leaves of their own keep the gradients of micro-batches apart; the memory is the weights' own on a CPU.
        leaves = {name: weight.detach().to(device).requires_grad_(True) for name, weight in weights.items()}
        dropping = config.lora.dropout > 0
        dropout = DropoutKey(config.seed, place.client, place.step, place.micro) if dropping else None
        states, tape = self.ends.forward_a(batch, leaves, dropout)
        released = self.noise.release(states, batch, adapter)
        data = encode_rows(self.codec, released.rows.detach().numpy())
        return Sent(batch, leaves, dropout, released, tape, data)

    def loss(self, sent: Sent, answer: Message, place: Place) -> Judged:
        """Run C and the head on B's rows, and back. Raises `BadStates`, `NonFiniteStates` for what the server sent."""
        states = self._decode(answer, sent).to(self.ends.c.segment.device, self.ends.c.segment.dtype)
        loss = self.ends.loss(states, sent.batch, sent.leaves, sent.dropout)
        if not math.isfinite(loss.loss_sum) or not bool(torch.isfinite(loss.grad).all()):
            return Judged(None, loss.targets, None)
        grad = self._gradient_noise.release(loss.grad, place.step, place.micro)
        return Judged(loss.loss_sum, loss.targets, encode_rows(self.gradient_codec, grad.numpy()))

    def backward(self, sent: Sent, answer: Message) -> dict[str, Tensor]:
        """Take the server's gradient back through noise and A; give the adapters' gradients, sums, on the CPU."""
        if sent.tape is not None:
            states = sent.tape.output
            grad = sent.released.backward(self._decode(answer, sent)).to(states.device, states.dtype)
            self.ends.backward_a(sent.tape, grad)
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in sent.leaves.items()}

    def _decode(self, answer: Message, sent: Sent) -> Tensor:
        rows = np.empty((len(sent.batch.token_ids), self._width), np.float32)
        decode_rows(answer.codec, answer.rows, rows)
        return torch.from_numpy(rows)
