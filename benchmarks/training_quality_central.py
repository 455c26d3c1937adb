"""The same fine-tuning as it is usually done: transformers and PEFT, the whole model and all data in one process."""

from __future__ import annotations

import asyncio
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training_quality_setup import Setup
from split_llama.config import BlockRange
from split_llama.lora import Adapter, init_lora, write_adapter
from training.compute.batch import NO_TARGET
from training.evaluate.central import CentralModel
from training.tasks.examples import Sample
from training.tasks.order import Order


def run_central(setup: Setup) -> tuple[list[float], dict[str, Tensor]]:
    """Train; give the mean token loss of each step, and the adapter's tensors by our names."""
    from transformers import get_scheduler

    config, (samples,) = setup.config, setup.shares()
    spec = config.optimizer
    model = _model(setup)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    schedule = get_scheduler(spec.schedule, adam, num_warmup_steps=spec.warmup_steps, num_training_steps=config.steps)
    order = Order(samples, config.batch_size, config.seed)
    curve = []
    for step in range(config.steps):
        loss = model(**_padded(order.batch(step)), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.max_grad_norm or float("inf"))
        adam.step()
        schedule.step()
        adam.zero_grad()
        curve.append(float(loss.detach()))
    return curve, {name: parameter.detach() for name, parameter in _adapted(model).items()}


def generated_accuracy(setup: Setup, weights: Mapping[str, Tensor]) -> float:
    """Let transformers and PEFT answer all held-out questions greedily, and count the answers that are right."""
    samples = setup.of_task.held_out
    begins = [next(at for at, label in enumerate(one.labels) if label != NO_TARGET) for one in samples]
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), Adapter(setup.config.lora.config, weights), setup.of_task.model)
        model = CentralModel.load(setup.of_task.folder, Path(folder), device="cpu", batch=50)
        prompts = [one.token_ids[:begin] for one, begin in zip(samples, begins, strict=True)]
        said = asyncio.run(model.continuations(prompts, 16, lambda done: None))
    # The last token is the end token, which the continuation leaves out.
    wanted = [list(one.token_ids[begin:-1]) for one, begin in zip(samples, begins, strict=True)]
    return sum(left == right for left, right in zip(said, wanted, strict=True)) / len(samples)


def _model(setup: Setup) -> Any:
    """PEFT's LoRA on transformers' model, with the first values that a job of this seed begins with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora, geometry = setup.config.lora.config, setup.of_task.checkpoint.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(str(setup.of_task.folder), dtype=torch.float32)
        how = LoraConfig(
            r=lora.r, lora_alpha=int(lora.alpha), target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, how)
    first = init_lora(geometry, lora, BlockRange(0, geometry.num_hidden_layers), setup.config.seed)
    with torch.no_grad():
        for name, parameter in _adapted(model).items():
            parameter.copy_(first[name])
    return model.train()


def _adapted(model: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def _padded(samples: Sequence[Sample]) -> dict[str, Tensor]:
    def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": pad([one.token_ids for one in samples], 0),
        "attention_mask": pad([[1] * len(one.token_ids) for one in samples], 0),
        "labels": pad([one.labels for one in samples], NO_TARGET),
    }
