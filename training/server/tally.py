"""What is counted: for each job and its members, and as Prometheus counters for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from split_llama.extension import Host


@dataclass(slots=True)
class MemberTally:
    """One client's samples, and how often its share was late, clipped or could not be used."""

    samples: int = 0
    left_out: int = 0
    clipped: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Tally:
    """A job's counts since it was made; what a restart repeats counts again. `loss` is the newest step's."""

    loss: float | None = None
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    members: dict[int, MemberTally] = field(default_factory=dict)

    def member(self, index: int) -> MemberTally:
        """Give a member's counts."""
        return self.members.setdefault(index, MemberTally())

    def to_json(self) -> dict[str, Any]:
        """Give the counts as JSON can say them."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Tally:
        """Read what `to_json` gave."""
        members = {int(index): MemberTally(**each) for index, each in raw["members"].items()}
        return cls(**{**raw, "members": members})


class Meters:
    """Prometheus counters of all jobs together."""

    def __init__(self, host: Host) -> None:
        self.steps = host.counter("training_steps", "Optimizer steps of weight sets")
        self.samples = host.counter("training_samples", "Samples in these steps")
        self.tokens = host.counter("training_tokens", "Target tokens in these steps")
        self.skipped = host.counter(
            "training_skipped", "Shares of a step that could not be used: nothing finite in them"
        )
        self.left_out = host.counter("training_left_out", "Shares of a step that came too late")
        self.clipped = host.counter("training_clipped", "Shares of a step whose gradient was clipped")
        self.void = host.counter("training_void_micro_batches", "Micro-batches whose states or gradients were unusable")
        self.recomputed = host.counter("training_recomputed", "Passes that were computed once more for their backward")
        self.faults = host.counter("training_checkpoint_errors", "Checkpoints that could not be written")
