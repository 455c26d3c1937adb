"""Simulated links and drafters: what a pace would see, and how fast an answer would be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from edge_client.speculation.pace import DraftPace, Round, Wish

DEEPEST = 16


@dataclass(frozen=True)
class Link:
    """Seconds: a round trip, each further row, asking the drafter, each guess it makes; and how noisy it is."""

    trip: float
    row: float
    drafting: float = 0.001
    guess: float = 0.00002
    jitter: float = 0.1
    outliers: float = 0.02

    def seconds(self, rows: int, draw: random.Random) -> float:
        usual = self.trip + self.row * (rows - 1)
        late = 10 * self.trip if draw.random() < self.outliers else 0.0
        return usual * draw.uniform(1, 1 + self.jitter) + late


@dataclass(frozen=True)
class Drafting:
    """A drafter whose guess is right with a chance around `rate`, and which claims that chance to the power `claims`.

    It proposes a chain, and beside each of its guesses a second choice that takes half of what is left.
    """

    rate: float
    claims: float = 1.0

    def propose(self, wish: Wish, draw: random.Random) -> tuple[list[float], list[int], list[int]]:
        """Give stated chances, parents, and which guesses turn out right."""
        found: list[tuple[float, int, int, bool]] = []
        chance, parent, right = 1.0, -1, True
        for _ in range(DEEPEST):
            true = min(1.0, max(0.0, draw.gauss(self.rate, 0.1))) if 0 < self.rate < 1 else self.rate
            outcome = draw.random()
            first, second = true**self.claims, ((1 - true) / 2) ** self.claims * (self.rate > 0)
            found.append((chance * first, parent, len(found), right and outcome < true))
            found.append(
                (
                    chance * second,
                    parent,
                    len(found),
                    right and true <= outcome < true + (1 - true) / 2 * (self.rate > 0),
                )
            )
            chance, parent, right = chance * first, len(found) - 2, right and outcome < true
        ranked = sorted(found, key=lambda guess: (-guess[0], guess[2]))
        kept = [guess for guess in ranked[: wish.max_guesses] if guess[0] >= wish.min_chance]
        place = {guess[2]: index for index, guess in enumerate(kept)}
        chances = [guess[0] for guess in kept]
        parents = [place.get(guess[1], -1) for guess in kept]
        return chances, parents, [index for index, guess in enumerate(kept) if guess[3]]


def run(
    link: Link, drafting: Drafting, rounds: int, wish: Callable[[], Wish], pace: DraftPace | None = None, seed: int = 0
) -> float:
    """Give tokens per second over `rounds` rounds; `pace`, if any, sees each of them."""
    draw, weather = random.Random(seed), random.Random(seed + 1000)
    tokens = 0
    total = 0.0
    for _ in range(rounds):
        asked = wish()
        chances, accepted, took = [], [], 0.0  # type: ignore[var-annotated]
        if asked.max_guesses:
            chances, _, accepted = drafting.propose(asked, draw)
            took = (link.drafting + link.guess * len(chances)) * draw.uniform(1, 1.2)
        seconds = link.seconds(1 + len(chances), weather)
        tokens += 1 + len(accepted)
        total += seconds + took
        if pace is not None:
            pace.observe(Round(chances, accepted, seconds, took))
    return tokens / total
