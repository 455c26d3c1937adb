"""How often guesses of a stated chance are right, learnt as it goes. Pure: no clock, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# A bin covers chances within a factor of about 1.5; the last one holds all below 1.5^-11, about 1%.
BINS = 12
WIDTH = 0.4
# Guesses that a bin's prior weighs as much as.
PRIOR_GUESSES = 4.0
# Guesses of all bins that the prior "stated chances are right" weighs as much as.
TRUST = 3.0


class Calibration:
    """Accepted and sent guesses by stated chance, forgotten exponentially.

    The estimate for a bin shrinks towards the stated chance times the ratio over all bins, so that a few guesses do not
    swing it. It is then made monotone: of two guesses the one stated as likelier is never held to be less likely.
    """

    def __init__(self, decay: float) -> None:
        assert 0 < decay < 1, "a share to keep per round"
        self._decay = decay
        self._sent = [0.0] * BINS
        self._stated = [0.0] * BINS
        self._accepted = [0.0] * BINS

    def observe(self, chances: Sequence[float], accepted: Iterable[int]) -> None:
        """Take the outcome of one round: the chances of all guesses, and the numbers of those accepted."""
        for counts in (self._sent, self._stated, self._accepted):
            counts[:] = [count * self._decay for count in counts]
        for chance in chances:
            self._sent[_bin(chance)] += 1
            self._stated[_bin(chance)] += chance
        for guess in accepted:
            self._accepted[_bin(chances[guess])] += 1

    def forget(self, share: float) -> None:
        """Keep only `share` of the evidence."""
        for counts in (self._sent, self._stated, self._accepted):
            counts[:] = [count * share for count in counts]

    def ratio(self) -> float:
        """Accepted guesses per guess that was to be expected."""
        return (sum(self._accepted) + TRUST) / (sum(self._stated) + TRUST)

    def actual(self) -> list[float]:
        """Estimate of the true chance for each bin, from the highest stated chances down; never rising."""
        ratio = self.ratio()
        estimates = [
            (self._accepted[i] + PRIOR_GUESSES * min(1.0, ratio * _middle(i))) / (self._sent[i] + PRIOR_GUESSES)
            for i in range(BINS)
        ]
        return _never_rising(estimates, [count + PRIOR_GUESSES for count in self._sent])

    def stated_for(self, wanted: float) -> float:
        """Give the lowest stated chance whose true chance is estimated at `wanted` or more; above 1 if there is none.

        Between the middles of two bins the estimate is interpolated in logarithms.
        """
        actual = self.actual()
        if actual[0] < wanted:
            # Inside the first bin stated chances run up to 1, half a bin above its middle.
            return _middle(0) * wanted / max(actual[0], 1e-9)
        last = max(i for i in range(BINS) if actual[i] >= wanted)
        if last == BINS - 1:
            return _middle(last) * wanted / actual[last]
        upper, lower = math.log(actual[last]), math.log(max(actual[last + 1], 1e-9))
        share = (upper - math.log(wanted)) / max(upper - lower, 1e-9)
        return _middle(last) * math.exp(-WIDTH * min(1.0, share))


def _bin(chance: float) -> int:
    return min(BINS - 1, int(-math.log(max(chance, 1e-9)) / WIDTH)) if chance < 1 else 0


def _middle(index: int) -> float:
    return math.exp(-WIDTH * (index + 0.5))


def _never_rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Pool adjacent violators: the closest sequence, in weighted squares, that never rises."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while pools and pools[-1][0] < value:
            above, mass, members = pools.pop()
            value = (value * weight + above * mass) / (weight + mass)
            weight += mass
            count += members
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]
