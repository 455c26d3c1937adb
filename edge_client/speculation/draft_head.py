"""The learned draft head: a small recurrent network that runs ahead of the model.

    (state s at a position, token t chosen there)  ->  predicted state s' at the next position  ->  LM head  ->  chances

It is Hydra's and EAGLE's idea (Ankner et al. 2024, Li et al. 2024) without attention, as in ReDrafter (Zhang et al.
2024): states are outputs of the model's own final norm, which already hold what the model found in its context, and the
model's own LM head reads the predicted ones. A small memory carries what the last true state said past the predicted
ones. Only the LM head's rows of frequent tokens are read: other tokens are never guessed.

Shapes: B rows, d width of the model, v tokens that can be guessed, m width of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Temperatures are fitted for so many steps; deeper ones use the last.
CALIBRATED_STEPS = 5


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of a head: of the model's states, of the hidden layer, of the memory."""

    width: int
    hidden: int
    memory: int

    @classmethod
    def usual(cls, width: int) -> HeadShape:
        """Sizes that fit a model of this width: more learns no better in the minutes that there are."""
        return cls(width, max(256, min(2 * width, 1024)), max(64, min(width // 2, 256)))

    @property
    def linear(self) -> int:
        """Units of the hidden layer without a nonlinearity: a good part of the step is linear."""
        return min(self.width, 512)


class DraftHead(nn.Module):
    """One step of the recurrence, `[B, d]`, `[B, d]`, `[B, m]` to the next state and memory."""

    scale: Tensor
    temperatures: Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        d, h, m = shape.width, shape.hidden, shape.memory
        # One matrix for all that reads the input: linear units, gates and values of the gated ones, and how much to
        # remember of what.
        self.parts = [shape.linear, h, h, m, m]
        self.read: nn.Module = nn.Linear(2 * d + m, sum(self.parts))
        self.write: nn.Module = nn.Linear(shape.linear + h, d)
        # What a state's coordinate measures on average, and how much to flatten the chances of each step.
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("temperatures", torch.ones(CALIBRATED_STEPS))

    def begin(self, states: Tensor) -> Tensor:
        """Give the memory before the first step, `[B, m]`."""
        return states.new_zeros(len(states), self.shape.memory)

    def forward(self, states: Tensor, embeddings: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the states after the given tokens, whose embeddings are given."""
        d = self.shape.width
        x = torch.cat((F.rms_norm(states, (d,)), F.rms_norm(embeddings, (d,), eps=1e-12), memory), dim=1)
        linear, gate, up, share, new = self.read(x).split(self.parts, dim=1)
        states = self.scale * self.write(torch.cat((linear, F.silu(gate) * up), dim=1))
        return states, torch.lerp(memory, new.tanh(), share.sigmoid())

    def temperature(self, step: int) -> Tensor:
        """Temperature of the chances after step `step`, counted from 0."""
        return self.temperatures[min(step, CALIBRATED_STEPS - 1)]

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return sum(parameter.nbytes for parameter in self.parameters())
