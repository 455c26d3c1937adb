"""One gradient out of what clients contribute to a step: by tokens, by the paper's sum, or robustly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import UsageError
from training.compute.flat import PIECE, FlatTensors, Layout
from training.compute.lora import recording
from training.job_config import JobConfig

# AdamW keeps squares of gradients: beyond this one client's would overflow float32, and stay in everybody's moments.
LARGEST_NORM = 1e18


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

    @property
    def is_robust(self) -> bool:
        """Say whether no single client can move a coordinate at will."""
        return self.kind in ("median", "trimmed-mean")

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

    flat: FlatTensors
    targets: int
    clipped: tuple[Clipped, ...]
    dropped: tuple[str, ...]

    @property
    def grads(self) -> dict[str, Tensor]:
        """The gradient by name, as views."""
        return self.flat.views


@dataclass(frozen=True, slots=True, eq=False)
class _Counted:
    """What counts of a contribution: its target tokens, and the gradients as one flat tensor."""

    targets: int
    flat: Tensor

    @property
    def mean(self) -> Tensor:
        return self.flat * (1 / self.targets)


def combine(contributions: Sequence[Contribution], rule: Rule) -> Combined:
    """Make one gradient. Who contributes NaN, infinity or, unclipped, a norm beyond `LARGEST_NORM` is left out and
    named; who has no tokens adds nothing.

    Raises `UsageError` where names or shapes of the contributions differ.
    """
    layout = Layout.of(contributions[0].grads) if contributions else Layout({})
    with recording(graph=False):
        counted, clipped, dropped = _accept(contributions, rule, layout)
        grads = FlatTensors(layout, _joined(counted, rule)) if counted else FlatTensors.of({})
    return Combined(grads, sum(entry.targets for entry in counted), tuple(clipped), tuple(dropped))


def _accept(
    contributions: Sequence[Contribution], rule: Rule, layout: Layout
) -> tuple[list[_Counted], list[Clipped], list[str]]:
    counted: list[_Counted] = []
    clipped: list[Clipped] = []
    dropped: list[str] = []
    largest = LARGEST_NORM if rule.max_norm is None else math.inf
    for entry in contributions:
        grads = layout.pack(entry.grads)
        norm, flat = grads.norm, grads.flat
        if not norm < largest:
            dropped.append(entry.client)
        elif entry.targets > 0:
            mean_norm = norm / entry.targets
            if rule.max_norm is not None and mean_norm > rule.max_norm:
                clipped.append(Clipped(entry.client, mean_norm))
                flat = flat * (rule.max_norm / mean_norm)
            counted.append(_Counted(entry.targets, flat))
    return counted, clipped, dropped


def _joined(counted: Sequence[_Counted], rule: Rule) -> Tensor:
    if rule.kind == "tokens":
        return _sum([entry.flat for entry in counted]).div_(sum(entry.targets for entry in counted))
    means = [entry.mean for entry in counted]
    return _sum(means) if rule.kind == "paper-sum" else robust_mean(means, rule)


def robust_mean(flats: Sequence[Tensor], rule: Rule) -> Tensor:
    """Give the median or the trimmed mean of flat tensors, coordinate by coordinate."""
    assert rule.is_robust, "the other rules weigh whole tensors"
    cut = len(flats) // 2 if rule.kind == "median" else math.floor(rule.trim * len(flats))
    # Of an even number of values the median is the mean of the middle two, as statistics has it.
    cut -= int(2 * cut == len(flats))
    # Sorting takes several times the memory of what it sorts: a piece at a time.
    pieces = zip(*(torch.split(flat, PIECE) for flat in flats), strict=True)
    return torch.cat([_trimmed(torch.stack(piece), cut) for piece in pieces])


def _trimmed(stacked: Tensor, cut: int) -> Tensor:
    """Leave out the `cut` largest and smallest of the first dimension, each coordinate by itself; mean of the rest."""
    return stacked.sort(dim=0).values[cut : len(stacked) - cut].mean(dim=0)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total
