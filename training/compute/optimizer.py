"""AdamW over one set of adapter weights, whose whole state is flat named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import CheckpointError, UsageError
from training.compute.flat import FlatTensors, Layout
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
        self._layout = Layout.of(params)
        if not params:
            raise UsageError("an optimizer needs at least one weight; lora.segments and the partition leave none here")
        with recording(graph=False):
            self._flat = self._layout.pack(params).flat.clone().requires_grad_(True)
            views = self._layout.views(self._flat.detach())
            self.weights = {name: view.requires_grad_(True) for name, view in views.items()}
        self._adam = torch.optim.AdamW(
            [self._flat], lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
        )

    def step(self, grads: Mapping[str, Tensor], lr: float) -> StepReport:
        """Clip the gradient by its global norm (`max_grad_norm`), as `clip_grad_norm_` does, and take one step.

        A gradient that is not finite changes nothing; the report says so. Raises `UsageError` where names or shapes
        are not those of the weights.
        """
        flat = self._packed("gradients", grads, UsageError)
        with recording(graph=False):
            norm = float(torch.linalg.vector_norm(flat))
            if not norm < float("inf"):
                return StepReport(norm, applied=False)
            limit = self._spec.max_grad_norm
            scale = 1.0 if limit is None else min(1.0, limit / (norm + _LEAST_NORM))
            self._adam.param_groups[0]["lr"] = lr
            # What was given stays as it is.
            self._flat.grad = flat if scale == 1.0 else flat * scale
            self._adam.step()
            self._flat.grad = None
        return StepReport(norm, applied=True)

    @property
    def values(self) -> FlatTensors:
        """The weights' values, which share their storage and are no leaves."""
        with recording(graph=False):
            return FlatTensors(self._layout, self._flat.detach())

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Take other values for the weights, as after averaging; the moments stay. Raises `UsageError`."""
        flat = self._packed("weights", weights, UsageError)
        with recording(graph=False):
            self._flat.detach().copy_(flat)

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
                stored |= {prefix + name: view.clone() for name, view in self._layout.views(flat).items()}
        return stored

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises `CheckpointError`, and changes nothing, where it does not fit."""
        weights, moments, squares = (self._stored(tensors, prefix) for prefix in (WEIGHT, MOMENT, SQUARE))
        if STEP not in tensors or len(tensors) != 1 + 3 * len(self.weights):
            raise CheckpointError("the stored optimizer state is not that of these weights; it has other tensors")
        with recording(graph=False):
            self._flat.detach().copy_(weights)
            self._adam.state[self._flat] = {
                "step": tensors[STEP].detach().to("cpu", torch.float32, copy=True),
                "exp_avg": moments.to(self._flat.device),
                "exp_avg_sq": squares.to(self._flat.device),
            }

    def _stored(self, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
        part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return self._packed("stored optimizer tensors", part, CheckpointError)

    def _packed(
        self, what: str, tensors: Mapping[str, Tensor], error: type[UsageError] | type[CheckpointError]
    ) -> Tensor:
        """Give tensors as one flat one, in the weights' order; what is flat already is given as it is."""
        if not isinstance(tensors, FlatTensors) or not self._layout.is_same(tensors.layout):
            misfit = self._layout.misfit(tensors)
            if misfit is not None:
                raise error(f"the {what} are not of these weights: {misfit}")
        return self._layout.pack(tensors).flat
