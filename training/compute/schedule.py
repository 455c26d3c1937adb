"""Learning rates by step, as pure functions: nothing to store, nothing to advance.

The formulas are those of `transformers.get_scheduler` by the same names, which the tests compare them with. They are
written out because importing transformers holds a process for seconds, and the server has chats to serve meanwhile.
"""

from __future__ import annotations

import math

from split_llama.errors import UsageError
from training.job_config import OptimizerPart

# The timescale of "inverse_sqrt" where there is no warm-up.
INVERSE_SQRT_STEPS = 10_000


def learning_rate(spec: OptimizerPart, step: int, total: int) -> float:
    """Give the learning rate of optimizer step `step` of `total`, counted from 1.

    It is what transformers' scheduler gives after `step - 1` of its own steps. Raises `UsageError` for a step below 1.
    """
    if step < 1:
        raise UsageError(f"optimizer steps are counted from 1; got {step}")
    return spec.lr * _factor(spec.schedule, step - 1, spec.warmup_steps, total)


def _factor(schedule: str, done: int, warmup: int, total: int) -> float:
    """Give the factor after `done` steps; a warm-up begins at 0, as transformers' does."""
    if schedule == "constant":
        return 1.0
    if done < warmup:
        return done / max(1, warmup)
    progress = (done - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, (total - done) / max(1, total - warmup))
    if schedule == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "inverse_sqrt":
        timescale = warmup or INVERSE_SQRT_STEPS
        return 1 / math.sqrt((done - warmup + timescale) / timescale)
    assert schedule == "constant_with_warmup", "the job's configuration knows no other"
    return 1.0
