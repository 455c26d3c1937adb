"""What the books of a job hold: micro-batches, cohorts, shares."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from split_llama.wire.codec import Codec
from split_llama.wire.training import Commit, Message


class Phase(Enum):
    """Life of a micro-batch: its states wait, go forward, were answered; its gradient is here, was added; or never."""

    WAITING = "waiting"
    RUNNING = "running"
    ANSWERED = "answered"
    RETURNED = "returned"
    DONE = "done"
    VOID = "void"


SETTLED = frozenset({Phase.DONE, Phase.VOID})
# The client waits for an answer.
OWED = frozenset({Phase.WAITING, Phase.RUNNING, Phase.RETURNED})


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Encoded rows as they came."""

    codec: Codec
    count: int
    data: bytes | memoryview


@dataclass(slots=True, eq=False)
class Micro:
    """One micro-batch of one client in one step, as long as it lives; `seq` is FORWARD's and `back_seq` BACKWARD's.

    `count` rows of `lengths` came as `rows`; `answer` is what its BACKWARD was answered with.
    """

    client: int
    step: int
    number: int
    targets: int
    lengths: tuple[int, ...]
    seq: int
    rows: Rows | None
    arrived_at: float
    phase: Phase = Phase.WAITING
    gradient: Rows | None = None
    back_seq: int = 0
    returned_at: float = 0.0
    answer: Message | None = None

    @property
    def count(self) -> int:
        """How many rows it has."""
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept."""
        kept = (self.rows, self.gradient)
        return sum(len(rows.data) for rows in kept if rows is not None) + len(self.answer.rows if self.answer else b"")

    def settle(self, phase: Phase, answer: Message | None = None) -> None:
        """End its life: nothing but the answer is kept."""
        self.phase, self.rows, self.gradient, self.answer = phase, None, None, answer


@dataclass(slots=True, eq=False)
class Cohort:
    """Micro-batches that go through one pass, and the tape of it, which holds `nbytes`.

    Without a tape its backward computes the forward once more. `release` is told of bytes that are free again.
    """

    members: tuple[Micro, ...]
    tape: Any = None
    nbytes: int = 0
    answered_at: float = 0.0
    release: Callable[[int], None] | None = None

    def drop_tape(self) -> None:
        """Give the tape's memory back."""
        if self.release is not None:
            self.release(self.nbytes)
        self.tape, self.nbytes, self.release = None, 0, None


@dataclass(slots=True, eq=False)
class Share:
    """All of one client in one step. `out` means that it is left out; `tensors` came with the commit.

    `newest` is the highest number of its micro-batches, -1 before the first; `answered` are those whose backward's
    answer is kept.
    """

    client: int
    step: int
    micros: dict[int, Micro] = field(default_factory=dict)
    newest: int = -1
    answered: deque[Micro] = field(default_factory=deque)
    commit: Commit | None = None
    committed_at: float = 0.0
    tensors: Any = None
    out: bool = False

    @property
    def is_open(self) -> bool:
        """Say whether more may come of it."""
        return self.commit is None and not self.out

    def add(self, micro: Micro) -> None:
        """Take a micro-batch in."""
        self.micros[micro.number] = micro
        self.newest = max(self.newest, micro.number)

    @property
    def targets(self) -> int:
        """How many target tokens were added."""
        return sum(micro.targets for micro in self.micros.values() if micro.phase is Phase.DONE)

    @property
    def samples(self) -> int:
        """How many samples were added: what counts is what was computed, whatever the commit says."""
        return sum(len(micro.lengths) for micro in self.micros.values() if micro.phase is Phase.DONE)
