"""What a job's clients are told about steps: who is in, what became of the step, and the numbers that go with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from split_llama.wire.training import Outcome
from training.server.records import Share
from training.server.sets import Stepped


def mean_loss(shares: Sequence[Share], skipped: Mapping[int, str]) -> float | None:
    """Give the mean loss per target token over all shares that count and whose loss is a number."""
    counted = [
        share.commit
        for share in shares
        if share.commit is not None and share.commit.loss is not None and share.client not in skipped
    ]
    targets = sum(commit.targets for commit in counted)
    if not targets:
        return None
    mean = math.fsum(commit.loss or 0.0 for commit in counted) / targets
    return mean if math.isfinite(mean) else None


def outcome(
    generation: int, step: int, client: int, shares: Sequence[Share], stepped: Stepped, loss: float | None
) -> Outcome:
    """Say to one client what became of a step."""
    included = stepped.stayed is None and client not in stepped.skipped
    return Outcome(
        generation=generation,
        step=step,
        included=included and any(share.client == client for share in shares),
        loss=loss,
        learning_rate=stepped.learning_rate,
        gradient_norm=stepped.norm,
        clipped_from=stepped.clipped.get(client),
        skipped=stepped.stayed,
    )
