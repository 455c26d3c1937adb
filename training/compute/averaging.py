"""Weighted federated averaging (McMahan et al. 2017) of whole weight sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from split_llama.errors import UsageError
from training.compute.lora import recording


def average(weight_sets: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Give `sum_k shares[k] * weight_sets[k] / sum(shares)` by name; a share is, say, a client's number of samples.

    Raises `UsageError` where there is nothing to average or a share is negative or not finite.
    """
    total = math.fsum(shares)
    if len(weight_sets) != len(shares) or not all(0 <= share < math.inf for share in shares) or not total > 0:
        raise UsageError(f"an average needs a share of at least 0 for each set, not all 0; got {list(shares)}")
    names = set(weight_sets[0])
    if any(set(weights) != names for weights in weight_sets):
        raise UsageError("an average needs sets of the same weights; these differ in their names")
    with recording(graph=False):
        return {name: _mean([weights[name] for weights in weight_sets], shares, total) for name in weight_sets[0]}


def _mean(tensors: Sequence[Tensor], shares: Sequence[float], total: float) -> Tensor:
    mean = tensors[0].detach() * (shares[0] / total)
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        mean.add_(tensor.detach(), alpha=share / total)
    return mean
