"""The least time that split fine-tuning can take, from what its parts take. Pure.

Of one micro-batch: A forward `a_f`, B forward `b_f`, C with the head there and back `c`, B backward `b_b`, A backward
`a_b`; `b(k)` is B's `b_f + b_b` for k clients' micro-batches in one pass, and R the link's round trip. One client has
one thread, and so has the server; the machine has some cores. What follows from the data alone:

sequential           B's weights of step t + 1 follow from b_b of step t. So a step takes at least
                     b_f + R + c + b_b: its client's A forward can be done before, A backward and the commit after.
client-batch         B is there for all at once, so server and clients take turns: b_f(M), R, C of all, b_b(M), R, A of
                     all. A step takes at least b(M) + 2 R + (a_f + c + a_b) * M / min(M, cores).
server-hierarchical  each client goes round by itself, and whoever is ready shares a pass. With the M clients in k
                     passes of M / k, for the k that is best, a step of all takes at least the greatest of
                     - one round of a client: 2 R + a_f + b(M / k) + c + a_b (its A waits for its own backward);
                     - the server's one thread: k * b(M / k);
                     - all computing over all cores: (k * b(M / k) + M * (a_f + c + a_b)) / cores.

With k micro-batches in a step, up to `window` of them under way, one client needs at least the greatest of
                     - the server's thread with the way to it and back: a_f + R + k * b + a_b;
                     - its own thread: k * (a_f + c + a_b);
                     - the round trips one after the other: ceil(k / window) * (2 R + a_f + b + c + a_b) less what a
                       window hides, for which only the first of the window is counted here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one micro-batch of one client; `b` by the number of clients whose micro-batches share a pass."""

    a_forward: float
    c: float
    a_backward: float
    b: Mapping[int, float]

    @classmethod
    def of(cls, measured: Mapping[int, Mapping[str, float]]) -> Parts:
        """Read what was measured for 1, 2 ... clients in a pass."""
        alone = measured[1]
        return cls(
            alone["a_forward"],
            alone["c"],
            alone["a_backward"],
            {clients: found["b_forward"] + found["b_backward"] for clients, found in measured.items()},
        )

    @property
    def ends(self) -> float:
        """A client's own."""
        return self.a_forward + self.c + self.a_backward


def step_bounds(strategy: str, clients: int, parts: Parts, trip: float, cores: float) -> dict[str, float]:
    """Give the bounds of one step of all clients (of one client if sequential) by what bounds it."""
    if strategy == "sequential":
        return {"dependencies": trip + parts.c + parts.b[1], "cores": (parts.b[1] + parts.ends) / cores}
    if strategy == "client-batch":
        turns = clients / min(clients, cores)
        return {
            "dependencies": parts.b[clients] + 2 * trip + turns * parts.ends,
            "cores": (parts.b[clients] + clients * parts.ends) / cores,
        }
    ways = [_in_passes(clients, size, parts, trip, cores) for size in parts.b if clients % size == 0]
    return min(ways, key=lambda bounds: max(bounds.values()))


def _in_passes(clients: int, size: int, parts: Parts, trip: float, cores: float) -> dict[str, float]:
    """Give the bounds of own sets with `size` clients in each pass."""
    server = clients // size * parts.b[size]
    return {
        "dependencies": 2 * trip + parts.b[size] + parts.ends,
        "server": server,
        "cores": (server + clients * parts.ends) / cores,
    }


def window_bounds(micros: int, window: int, parts: Parts, trip: float) -> dict[str, float]:
    """Give the bounds of one client's step of several micro-batches."""
    return {
        "server": parts.a_forward + trip + micros * parts.b[1] + parts.a_backward,
        "client": micros * parts.ends,
        "round trips": math.ceil(micros / window) * (2 * trip + parts.b[1] + parts.ends),
    }
