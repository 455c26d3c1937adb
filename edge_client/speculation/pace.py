"""When to draft and how much. Pure: no clock, no torch.

A round with `n` guesses takes `T(n) = t0 + c n + d(n)`: the round trip, the rows, the drafting. It yields on average
`E = 1 + sum of p_i` tokens, where `p_i` is the chance that guess `i` and all above it are right (linearity of
expectation; the 1 is the token that every round gives). The speed to be maximised is `E / T`.

Which guesses pay? Suppose the best speed is `R`. A plan reaches it exactly if it maximises `E - R T` (Dinkelbach 1967,
"On nonlinear fractional programming"), and in that form every guess stands for itself: guess `i` adds `p_i - R c'` with
`c' = c + d'`, the cost of one more row. So a guess pays if and only if

    p_i >= c' R        (chance at least: cost of a row times tokens per second),

and as no guess is likelier than its parent, the guesses that pay form a tree. `R` is not known beforehand; taking the
speed reached lately in its place is Dinkelbach's iteration, which converges superlinearly. Drafting as a whole pays if
the speed with it is above `1 / t0`, that without. (Sequoia, Chen et al. 2024, and EAGLE-2, Li et al. 2024, choose trees
by the same sum of path probabilities, for a fixed number of nodes.)

Chances are a drafter's claims: `Calibration` learns what they are worth. Where drafting does not pay it rests, and
probes again after a time that doubles and that keeps the time lost by probing below 3%.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.speculation.calibration import Calibration
from edge_client.speculation.cost import RobustLine

MOST_GUESSES = 63
# Guesses at first, before anything is known.
FIRST_GUESSES = 8
FIRST_CHANCE = 0.1
# Every guess sent is a row that the server sees: none is sent for less than this, however cheap the link makes it.
LEAST_CHANCE = 0.01
# Shares of the evidence that are kept per round: on the link and on what chances are worth, and on whether it pays.
DECAY = 0.96
SPEED_DECAY = 0.92
# A round's cost per row before it was ever measured, as a share of the whole.
PRIOR_ROW_SHARE = 0.02
# Drafted rounds before drafting is judged, and so few where it has cost this many round trips by then. One would be too
# few: a drafter's first use may take a hundred times as long as the others.
PROBE_ROUNDS = 3
DEAR_ROUNDS = 2
PROBE_LOSS = 4.0
# Drafting stops below this share of the speed without it: between it and 1 a coin's toss would decide.
STOP_BELOW = 0.98
# Rounds without drafting after a failed probe: at least, at most, and so that probing loses no more than this share.
FIRST_REST = 8
LONGEST_REST = 1024
LOSS_SHARE = 0.03
# Drafted rounds in a row after which a rest begins small again.
STEADY_ROUNDS = 24
# While drafting goes well, one round in so many goes without: t0 is measured, not guessed.
PLAIN_EVERY = 64
# Less than this is no time that was measured, and no time in which a drafter could have answered.
LEAST_SECONDS = 1e-9
LEAST_DRAFTING = 5e-6
# What a successor keeps of the evidence.
INHERITED = 0.5


@dataclass(frozen=True, slots=True)
class Wish:
    """How many guesses to ask for, and the least chance they must have; no guesses: do not draft now."""

    max_guesses: int
    min_chance: float


NOT_NOW = Wish(0, 1.0)


@dataclass(frozen=True, slots=True)
class Round:
    """What a round cost and brought: the chances of the guesses sent, and the numbers of those that were right.

    `seconds` is from the sending of the rows to the next tokens, and `drafting_seconds` what drafting took beside it:
    next to nothing says that no drafter was asked. In a pass with others it may be theirs.
    """

    chances: Sequence[float]
    accepted: Sequence[int]
    seconds: float
    drafting_seconds: float


@dataclass(slots=True)
class _Sums:
    """Drafted rounds, their guesses and tokens. Seconds are made of them when they are asked for:
    what was measured late corrects what was thought early."""

    rounds: float = 0.0
    guesses: float = 0.0
    tokens: float = 0.0

    def add(self, guesses: int, tokens: int, *, decay: float = 1.0) -> None:
        """Take one round, after forgetting some of those before."""
        self.rounds = self.rounds * decay + 1
        self.guesses = self.guesses * decay + guesses
        self.tokens = self.tokens * decay + tokens


class DraftPace:
    """Decides for one session, from what its rounds cost and brought."""

    def __init__(self) -> None:
        self._round = RobustLine(DECAY, PRIOR_ROW_SHARE)
        self._drafting = RobustLine(DECAY, 0.0, early=min)
        self._calibration = Calibration(DECAY)
        # Of the last drafted rounds, forgotten by and by; and of all since the last rest.
        self._lately = _Sums()
        self._probe = _Sums()
        self._rest = 0
        self._next_rest = FIRST_REST
        self._since_plain = 0

    def successor(self) -> DraftPace:
        """Make the pace of the next session over the same link: it begins with half of what this one knows."""
        heir = copy.deepcopy(self)
        heir._round.forget(INHERITED)
        heir._drafting.forget(INHERITED)
        heir._calibration.forget(INHERITED)
        return heir

    @property
    def is_resting(self) -> bool:
        """Whether drafting did not pay lately and waits for its next probe."""
        return self._rest > 0

    def plain_speed(self) -> float:
        """Tokens per second without drafting; 0 while unknown."""
        return 1 / self._round.base if self._round.base > LEAST_SECONDS else 0.0

    def speed(self) -> float:
        """Tokens per second with drafting, over the last drafted rounds; 0 while unknown."""
        seconds = self._cost(self._lately)
        return self._lately.tokens / seconds if seconds > LEAST_SECONDS else 0.0

    def _cost(self, sums: _Sums) -> float:
        """What such rounds cost as a rule: one late packet says nothing about drafting."""
        each = self._round.base + self._drafting.base
        return sums.rounds * each + sums.guesses * (self._round.slope + self._drafting.slope)

    def wish(self) -> Wish:
        """Say what the next round should be."""
        if self._rest > 0 or self._since_plain >= PLAIN_EVERY:
            return NOT_NOW
        if not self._round.is_known:
            # One round without tells what the others are to be measured by.
            return NOT_NOW
        if not self._drafting.is_known:
            return Wish(FIRST_GUESSES, FIRST_CHANCE)
        row = self._round.slope + self._drafting.slope
        worth = row * max(self.speed(), self.plain_speed())
        stated = max(LEAST_CHANCE, self._calibration.stated_for(max(worth, 1e-6)))
        return Wish(FIRST_GUESSES if self._probe.rounds < PROBE_ROUNDS else MOST_GUESSES, min(stated, 1.0))

    def observe(self, this: Round) -> None:
        """Take what a round brought."""
        guesses = len(this.chances)
        self._round.observe(guesses, this.seconds)
        if not guesses and (self._rest > 0 or this.drafting_seconds < LEAST_DRAFTING):
            self._rest = max(0, self._rest - 1)
            self._since_plain = 0
            return
        self._drafting.observe(guesses, this.drafting_seconds)
        self._since_plain = self._since_plain + 1 if guesses else 0
        self._calibration.observe(this.chances, this.accepted)
        for sums, decay in ((self._lately, SPEED_DECAY), (self._probe, 1.0)):
            sums.add(guesses, 1 + len(this.accepted), decay=decay)
        self._judge()

    def _judge(self) -> None:
        base, rounds = self._round.base, self._probe.rounds
        lost = self._cost(self._probe) - self._probe.tokens * base
        is_ripe = rounds >= PROBE_ROUNDS or (rounds >= DEAR_ROUNDS and lost > PROBE_LOSS * base)
        if is_ripe and self.speed() < STOP_BELOW * self.plain_speed():
            by_loss = lost / (LOSS_SHARE * base)
            self._rest = int(min(LONGEST_REST, max(self._next_rest, by_loss)))
            self._next_rest = min(LONGEST_REST, 2 * self._next_rest)
            # The next probe is judged by itself: what it is like now, not what it was like then.
            self._calibration.forget(INHERITED)
            self._lately, self._probe = _Sums(), _Sums()
        elif rounds >= STEADY_ROUNDS:
            self._next_rest = FIRST_REST
