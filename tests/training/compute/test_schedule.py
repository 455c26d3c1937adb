from __future__ import annotations

from typing import get_args

import pytest
import torch
from peft_oracle import peft_quiet

from split_llama.errors import UsageError
from training.compute.schedule import learning_rate
from training.job_config import OptimizerPart

SCHEDULES = get_args(OptimizerPart.model_fields["schedule"].annotation)


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_transformers(schedule: str, warmup: int) -> None:
    with peft_quiet():
        from transformers import get_scheduler

    spec = OptimizerPart(lr=3e-4, schedule=schedule, warmup_steps=warmup)
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=spec.lr)
    scheduler = get_scheduler(schedule, adam, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(1, 36):
        assert learning_rate(spec, step, 30) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-9, abs=1e-18)
        adam.step()
        scheduler.step()


def test_steps_are_counted_from_one() -> None:
    with pytest.raises(UsageError, match="counted from 1; got 0"):
        learning_rate(OptimizerPart(), 0, 10)
