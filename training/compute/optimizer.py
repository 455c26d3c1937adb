"""AdamW over one set of adapter weights, whose whole state is flat named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import CheckpointError, UsageError
from training.compute.lora import recording
from training.job_config import OptimizerPart

# What a tensor of the state begins with; then the weight's own name follows.
WEIGHT, MOMENT, SQUARE = "weight/", "exp_avg/", "exp_avg_sq/"
STEP = "step"
# In `torch.nn.utils.clip_grad_norm_` it keeps the divisor from being 0.
_LEAST_NORM = 1e-6


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did: the gradient's norm before clipping, and whether it was finite, so that the step was taken."""

    norm: float
    applied: bool


class AdapterOptimizer:
    """The weights of one set and their AdamW (torch's).

    All weights lie in one flat tensor, so that a step costs the same however many matrices are adapted; `weights` are
    views of it, leaves that require a gradient, and stay the same objects for good.
    """

    def __init__(self, params: Mapping[str, Tensor], spec: OptimizerPart) -> None:
        """Copy the first values of `params`, float32, by name."""
        self._spec = spec
        self._shapes = {name: tensor.shape for name, tensor in params.items()}
        if not self._shapes:
            raise UsageError("an optimizer needs at least one weight; lora.segments and the partition leave none here")
        with recording(graph=False):
            self._flat = self._flatten(params).requires_grad_(True)
            self.weights = {name: view.requires_grad_(True) for name, view in self._views(self._flat.detach()).items()}
        self._adam = torch.optim.AdamW(
            [self._flat], lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
        )

    def step(self, grads: Mapping[str, Tensor], lr: float) -> StepReport:
        """Clip the gradient by its global norm (`max_grad_norm`), as `clip_grad_norm_` does, and take one step.

        A gradient that is not finite changes nothing; the report says so. Raises `UsageError` where names or shapes
        are not those of the weights.
        """
        self._check("gradients", grads, UsageError)
        with recording(graph=False):
            flat = self._flatten(grads)
            norm = float(torch.linalg.vector_norm(flat))
            if not norm < float("inf"):
                return StepReport(norm, applied=False)
            if self._spec.max_grad_norm is not None:
                flat *= min(1.0, self._spec.max_grad_norm / (norm + _LEAST_NORM))
            self._adam.param_groups[0]["lr"] = lr
            self._flat.grad = flat
            self._adam.step()
            self._flat.grad = None
        return StepReport(norm, applied=True)

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Take other values for the weights, as after averaging; the moments stay. Raises `UsageError`."""
        self._check("weights", weights, UsageError)
        with recording(graph=False):
            self._flat.detach().copy_(self._flatten(weights))

    def tensors(self) -> dict[str, Tensor]:
        """Give copies of weights, moments and the number of steps taken: all that `load` needs."""
        state = self._adam.state.get(self._flat, {})
        with recording(graph=False):
            zeros = torch.zeros_like(self._flat)
            stored = {STEP: torch.tensor(float(state.get("step", 0.0)))}
            for prefix, flat in (
                (WEIGHT, self._flat.detach()),
                (MOMENT, state.get("exp_avg", zeros)),
                (SQUARE, state.get("exp_avg_sq", zeros)),
            ):
                stored |= {prefix + name: view.clone() for name, view in self._views(flat).items()}
        return stored

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises `CheckpointError`, and changes nothing, where it does not fit."""
        parts = {prefix: self._stored(tensors, prefix) for prefix in (WEIGHT, MOMENT, SQUARE)}
        if STEP not in tensors or len(tensors) != 1 + 3 * len(self._shapes):
            raise CheckpointError("the stored optimizer state is not that of these weights; it has other tensors")
        with recording(graph=False):
            self._flat.detach().copy_(self._flatten(parts[WEIGHT]))
            self._adam.state[self._flat] = {
                "step": tensors[STEP].detach().to("cpu", torch.float32, copy=True),
                "exp_avg": self._flatten(parts[MOMENT]),
                "exp_avg_sq": self._flatten(parts[SQUARE]),
            }

    def _stored(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self._check("stored optimizer tensors", part, CheckpointError)
        return part

    def _check(self, what: str, tensors: Mapping[str, Tensor], error: type[UsageError] | type[CheckpointError]) -> None:
        other = sorted(set(tensors) ^ set(self._shapes))
        if other:
            raise error(f"the {what} are not of these weights: {other[0]} is in only one of the two")
        for name, shape in self._shapes.items():
            if tensors[name].shape != shape:
                raise error(f"the {what}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}")

    def _flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy tensors into one, in the weights' order."""
        return torch.cat([tensors[name].detach().flatten().to(torch.float32) for name in self._shapes])

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
