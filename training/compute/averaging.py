"""Weighted federated averaging (McMahan et al. 2017) of whole weight sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from split_llama.errors import UsageError
from training.compute.aggregate import Rule, robust_mean
from training.compute.flat import FlatTensors, Layout
from training.compute.lora import recording


def average(
    weight_sets: Sequence[Mapping[str, Tensor]], shares: Sequence[float], rule: Rule | None = None
) -> FlatTensors:
    """Give `sum_k shares[k] * weight_sets[k] / sum(shares)` by name; a share is, say, a client's number of samples.

    With a robust rule it is the median or trimmed mean of the sets, coordinate by coordinate, whatever the shares.
    Raises `UsageError` where there is nothing to average, sets differ, or a share is negative or not finite.
    """
    total = math.fsum(shares)
    if len(weight_sets) != len(shares) or not all(0 <= share < math.inf for share in shares) or not total > 0:
        raise UsageError(f"an average needs a share of at least 0 for each set, not all 0; got {list(shares)}")
    layout = Layout.of(weight_sets[0])
    if any(weights.keys() != weight_sets[0].keys() for weights in weight_sets):
        raise UsageError("an average needs sets of the same weights; these differ in their names")
    with recording(graph=False):
        flats = [layout.pack(weights).flat for weights in weight_sets]
        if rule is not None and rule.is_robust:
            return FlatTensors(layout, robust_mean(flats, rule))
        return FlatTensors(layout, _mean(flats, shares, total))


def _mean(flats: Sequence[Tensor], shares: Sequence[float], total: float) -> Tensor:
    mean = flats[0] * (shares[0] / total)
    for flat, share in zip(flats[1:], shares[1:], strict=True):
        mean.add_(flat, alpha=share / total)
    return mean
