"""Training of the whole model in one place, a plain loop: what split fine-tuning is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from split_llama.config import Partition
from split_llama.lora import init_lora
from tests.training.server.world import World
from training.compute.averaging import average
from training.compute.batch import Batch
from training.compute.lora import Group, leaves_of, take_gradients
from training.compute.optimizer import AdapterOptimizer
from training.compute.ragged import Ragged
from training.compute.schedule import learning_rate
from training.compute.tape import Trunk, finish
from training.job_config import JobConfig


def joined(parts: Sequence[Batch]) -> Batch:
    """Make one batch of several."""
    lengths = tuple(length for part in parts for length in part.ragged.lengths)
    ids, labels = torch.cat([part.token_ids for part in parts]), torch.cat([part.labels for part in parts])
    return Batch(Ragged(lengths), ids, labels)


class Central:
    """The model with the adapters of all three segments, and one optimizer."""

    def __init__(self, world: World, config: JobConfig) -> None:
        self.config = config
        self.ends = world.ends(config)
        lora, layers = config.lora.config, world.config.num_hidden_layers
        partition = Partition.parse(config.partition)
        spans = {
            "A": partition.segment_a(layers),
            "B": partition.segment_b(layers),
            "C": partition.segment_c(layers),
        }
        first: dict[str, Tensor] = {}
        for name in config.lora.segments:
            first |= init_lora(world.config, lora, spans[name], config.seed)
        self.trunk = Trunk(world.host.dense_segment(torch.float32), lora if "B" in config.lora.segments else None)
        self.names_b = tuple(init_lora(world.config, lora, spans["B"], 0)) if "B" in config.lora.segments else ()
        self.optimizer = AdapterOptimizer(first, config.optimizer)

    def gradients(self, batch: Batch) -> tuple[float, int, dict[str, Tensor]]:
        """Give the summed loss, the targets, and the gradients of the sum."""
        leaves = leaves_of(self.optimizer.weights)
        group = Group(batch.ragged.lengths, {name: leaves[name] for name in self.names_b})
        rows, tape = self.ends.forward_a(batch, leaves, None)
        middle = finish(self.trunk.forward(rows, [group], keep=True))
        loss = self.ends.loss(middle.output, batch, leaves, None)
        self.ends.backward_a(tape, finish(middle.backward(loss.grad)))
        return loss.loss_sum, loss.targets, take_gradients(leaves)

    def step(self, step: int, batch: Batch) -> float:
        """Make an optimizer step on a batch; give its mean loss."""
        loss, targets, grads = self.gradients(batch)
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        self.optimizer.step({name: grad / targets for name, grad in grads.items()}, rate)
        return loss / targets

    @property
    def weights(self) -> dict[str, Tensor]:
        """All adapters' weights."""
        return {name: weight.detach().clone() for name, weight in self.optimizer.weights.items()}


def federated(runs: Sequence[Central], shares: Sequence[float]) -> Mapping[str, Tensor]:
    """Average separate runs and have all go on from it; their optimizers keep their moments."""
    mean = average([run.weights for run in runs], shares)
    for run in runs:
        run.optimizer.replace(mean)
    return mean
