"""What a round costs by the number of its rows: a line fitted as it goes, which outliers bend little. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

# Observations are kept whole until so many are there: a first one may be an outlier.
EARLY = 5
# The prior slope weighs as much as one observation at this many extra rows.
PRIOR_ROWS = 4.0
# A residual counts at most so many times the usual one.
CLIP = 3.0
# The usual residual is never held to be below this share of the prediction: a quiet link may turn noisy.
LEAST_SPREAD = 0.02
SPREAD_DECAY = 0.9


class RobustLine:
    """Least squares of `y = base + slope * x` with exponential forgetting, over winsorised residuals.

    While all x are alike the data cannot tell base from slope: a weak prior says that one step of x costs
    `prior_share` of the base. `early` makes one number of the first few: what is slow only at its first use is better
    judged by their minimum than by their median.
    """

    def __init__(
        self, decay: float, prior_share: float, *, early: Callable[[Sequence[float]], float] = statistics.median
    ) -> None:
        assert 0 < decay < 1, "a share to keep per observation"
        self._middle = early
        self._decay = decay
        self._share = prior_share
        self._early: list[tuple[float, float]] = []
        self._weight = self._x = self._xx = self._y = self._xy = 0.0
        self._spread = 0.0
        self.base = 0.0
        self.slope = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything was observed."""
        return bool(self._early) or self._weight > 0

    def at(self, x: float) -> float:
        """Predict y."""
        return self.base + self.slope * x

    def observe(self, x: float, y: float) -> None:
        """Take one observation, x and y at least 0."""
        if self._weight > 0:
            self._take(x, y)
            return
        self._early.append((x, y))
        self._guess_early()
        if len(self._early) == EARLY:
            self._spread = statistics.median(abs(seen - self.at(at)) for at, seen in self._early)
            early, self._early = self._early, []
            for at, seen in early:
                self._take(at, seen)

    def forget(self, share: float) -> None:
        """Keep only `share` of the evidence, so that new observations soon prevail."""
        self._weight, self._x, self._xx = self._weight * share, self._x * share, self._xx * share
        self._y, self._xy = self._y * share, self._xy * share

    def _guess_early(self) -> None:
        """The middle of what was seen at 0 and beyond; the prior's slope where one of them is missing."""
        at_zero = [y for x, y in self._early if x == 0]
        beyond = [(x, y) for x, y in self._early if x > 0]
        if at_zero and beyond:
            steps = statistics.fmean(x for x, _ in beyond)
            self.base = self._middle(at_zero)
            self.slope = max(0.0, self._middle([y for _, y in beyond]) - self.base) / steps
            return
        self.base = self._middle([y / (1 + self._share * x) for x, y in self._early])
        self.slope = self._share * self.base

    def _take(self, x: float, y: float) -> None:
        expected = self.at(x)
        limit = CLIP * max(self._spread, LEAST_SPREAD * expected)
        residual = min(limit, max(-limit, y - expected))
        # A lasting change of level keeps hitting the limit, which grows by a fifth each time: it is followed soon.
        self._spread = SPREAD_DECAY * self._spread + (1 - SPREAD_DECAY) * abs(residual)
        y = expected + residual
        self._weight = self._weight * self._decay + 1
        self._x = self._x * self._decay + x
        self._xx = self._xx * self._decay + x * x
        self._y = self._y * self._decay + y
        self._xy = self._xy * self._decay + x * y
        self._solve()

    def _solve(self) -> None:
        """Minimise the squares plus `PRIOR_ROWS^2 (slope - share * base)^2`, slope and base at least 0."""
        prior = PRIOR_ROWS**2
        a, b = self._weight + prior * self._share**2, self._x - prior * self._share
        c = self._xx + prior
        determinant = a * c - b * b
        self.base = max(0.0, (c * self._y - b * self._xy) / determinant)
        self.slope = max(0.0, (a * self._xy - b * self._y) / determinant)
        if self.slope == 0.0:
            self.base = self._y / self._weight
