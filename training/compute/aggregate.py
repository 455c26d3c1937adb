"""One gradient out of what clients contribute to a step: by tokens, by the paper's sum, or robustly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from split_llama.errors import UsageError
from training.compute.lora import recording
from training.job_config import JobConfig


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one client adds to a step: gradients of the *sum* of its token losses, and how many tokens and samples."""

    client: str
    targets: int
    samples: int
    grads: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """How contributions become one gradient.

    "tokens" weighs each client by its target tokens, which is the gradient of the mean token loss over all of them.
    "paper-sum" adds the clients' mean gradients, as the released code of arXiv 2505.15683 does: the step grows with
    their number. "median" and "trimmed-mean" (Yin et al. 2018) are per coordinate over the clients' mean gradients,
    `trim` being cut off at each end. `max_norm` clips each client's mean gradient first.
    """

    kind: str = "tokens"
    trim: float = 0.2
    max_norm: float | None = None

    def __post_init__(self) -> None:
        known = ("tokens", "paper-sum", "median", "trimmed-mean")
        if self.kind not in known:
            raise UsageError(f"the rule of aggregation must be one of {', '.join(known)}; got {self.kind!r}")

    @classmethod
    def of(cls, config: JobConfig) -> Rule:
        """Read a job's rule."""
        kind = config.weighting if config.aggregation == "mean" else config.aggregation
        return cls(kind, config.trim, config.client_max_grad_norm)


@dataclass(frozen=True, slots=True)
class Clipped:
    """A client whose mean gradient was longer than allowed, and the norm it had."""

    client: str
    norm: float


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The gradient of a step, empty if nobody contributed one; the tokens in it; who was clipped and who left out."""

    grads: dict[str, Tensor]
    targets: int
    clipped: tuple[Clipped, ...]
    dropped: tuple[str, ...]


def combine(contributions: Sequence[Contribution], rule: Rule) -> Combined:
    """Make one gradient. Who contributes NaN or infinity is left out and named; who has no tokens adds nothing."""
    with recording(graph=False):
        counted, clipped, dropped = _accept(contributions, rule)
        grads = _joined(counted, rule) if counted else {}
    return Combined(grads, sum(entry.targets for entry in counted), tuple(clipped), tuple(dropped))


def _accept(contributions: Sequence[Contribution], rule: Rule) -> tuple[list[Contribution], list[Clipped], list[str]]:
    counted: list[Contribution] = []
    clipped: list[Clipped] = []
    dropped: list[str] = []
    for entry in contributions:
        norm = _norm(entry.grads)
        if not norm < math.inf:
            dropped.append(entry.client)
        elif entry.targets > 0:
            mean_norm = norm / entry.targets
            if rule.max_norm is not None and mean_norm > rule.max_norm:
                clipped.append(Clipped(entry.client, mean_norm))
                entry = replace(entry, grads=_scaled(entry.grads, rule.max_norm / mean_norm))
            counted.append(entry)
    return counted, clipped, dropped


def _joined(counted: Sequence[Contribution], rule: Rule) -> dict[str, Tensor]:
    names = list(counted[0].grads)
    if rule.kind == "tokens":
        tokens = sum(entry.targets for entry in counted)
        return {name: _sum([entry.grads[name] for entry in counted]).div_(tokens) for name in names}
    means = [_scaled(entry.grads, 1 / entry.targets) for entry in counted]
    if rule.kind == "paper-sum":
        return {name: _sum([mean[name] for mean in means]) for name in names}
    cut = len(means) // 2 if rule.kind == "median" else math.floor(rule.trim * len(means))
    # Of an even number of values the median is the mean of the middle two, as statistics has it.
    cut -= int(2 * cut == len(means))
    return {name: _trimmed(torch.stack([mean[name] for mean in means]), cut) for name in names}


def _trimmed(stacked: Tensor, cut: int) -> Tensor:
    """Leave out the `cut` largest and smallest of the first dimension, each coordinate by itself; mean of the rest."""
    return stacked.sort(dim=0).values[cut : len(stacked) - cut].mean(dim=0)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _scaled(grads: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: grad * factor for name, grad in grads.items()}


def _norm(grads: Mapping[str, Tensor]) -> float:
    """Give the norm of all gradients together; NaN or infinity if and only if any of them is."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
