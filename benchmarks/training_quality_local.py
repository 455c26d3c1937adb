"""A split fine-tuning job in one process and one thread: the same maths without server, wire and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.training_quality_scores import Parts
from benchmarks.training_quality_setup import Setup
from split_llama.lora import init_lora
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from training.client.maths import ClientMaths, Place
from training.client.privacy import GradientNoise, GradientSpec
from training.compute.aggregate import Contribution, Rule, combine
from training.compute.averaging import average
from training.compute.batch import Batch
from training.compute.lora import Group, leaves_of, take_gradients
from training.compute.optimizer import AdapterOptimizer
from training.compute.schedule import learning_rate
from training.compute.tape import finish
from training.strategy import averages, contributors, make_strategy
from training.tasks.order import Order


@dataclass
class Member:
    """A client: its data, and how much of it was used; its adapters' optimizer (shared by all where they are)."""

    order: Order
    ends: AdapterOptimizer
    middle: AdapterOptimizer
    cursor: int = 0
    loss: list[float] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        """All its adapters, copied."""
        found = self.ends.weights | self.middle.weights
        return {name: tensor.detach().clone() for name, tensor in found.items()}


class LocalJob:
    """Runs a setup to its end."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        checkpoint = setup.of_task.checkpoint
        self.parts = Parts.load(checkpoint, self.config)
        self.strategy = make_strategy(self.config)
        first_ends = self.parts.ends.first_weights(self.config.seed)
        middle = self.parts.b.segment.blocks
        first_middle = init_lora(checkpoint.config, self.parts.lora, middle, self.config.seed)
        spec = self.config.optimizer
        shared = self.config.shares_all and not self.strategy.own_sets
        # Where the server owns all, one optimizer holds them together, so that one norm clips them together.
        all_ends, all_middle = AdapterOptimizer(first_ends, spec), AdapterOptimizer(first_middle, spec)
        self.joint = AdapterOptimizer(first_ends | first_middle, spec) if shared else None
        bos = setup.of_task.encoder.tokenizer.bos_token_id
        noise = self.parts.noise(setup.noise, bos, first_ends)
        width = checkpoint.config.hidden_size
        gradients = GradientNoise(GradientSpec(), bytes(32), "quality")
        self.maths = ClientMaths(self.parts.ends, self.config, noise, gradients, width)
        self.noise, self.width = noise, width
        self.bytes_up = self.bytes_down = 0
        self.members = [
            Member(
                Order(samples, self.config.batch_size, self.config.seed),
                all_ends if shared else AdapterOptimizer(first_ends, spec),
                AdapterOptimizer(first_middle, spec) if self.strategy.own_sets else all_middle,
            )
            for samples in setup.shares()
        ]

    def run(self) -> list[float]:
        """Run all steps; give the mean loss of each."""
        curve = []
        for step in range(1, self.config.steps + 1):
            who = contributors(self.strategy, step, frozenset(range(len(self.members))))
            curve.append(self._step(step, sorted(who)))
            if averages(self.config, self.strategy, step):
                self._average()
        return curve

    def _step(self, step: int, who: list[int]) -> float:
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        shares = {index: self._share(step, index) for index in who}
        if self.strategy.own_sets:
            for index, share in shares.items():
                self._apply([share], rate, self.members[index])
        else:
            self._apply(list(shares.values()), rate, self.members[who[0]])
        return sum(share.loss for share in shares.values()) / sum(share.targets for share in shares.values())

    def _apply(self, shares: list[Share], rate: float, member: Member) -> None:
        middle = combine([share.middle for share in shares], Rule.of(self.config))
        if self.joint is not None:
            ends = combine([share.ends for share in shares], Rule.of(self.config))
            self.joint.step(ends.grads | middle.grads, rate)
            for owner in (member.ends, member.middle):
                owner.replace({name: self.joint.weights[name] for name in owner.weights})
            return
        member.middle.step(middle.grads, rate)
        for share in shares:
            alone = combine([share.ends], Rule())
            share.owner.ends.step(alone.grads, rate)

    def _average(self) -> None:
        shares = [1.0] * len(self.members)
        mean = average([member.middle.weights for member in self.members], shares)
        for member in self.members:
            member.middle.replace(mean)
        if self.config.shares_all:
            mean = average([member.ends.weights for member in self.members], shares)
            for member in self.members:
                member.ends.replace(mean)

    def _share(self, step: int, index: int) -> Share:
        member, place = self.members[index], Place(str(index), step, 0)
        samples = member.order.batch(member.cursor)
        member.cursor += 1
        batch = Batch.of([one.token_ids for one in samples], [one.labels for one in samples])
        leaves = leaves_of(member.ends.weights)
        sent = self.maths.forward(batch, leaves, self.maths.adapter(leaves), place)
        middle = leaves_of(member.middle.weights)
        rows = self._decode(self.maths.codec, sent.data, len(batch.token_ids))
        tape = finish(self.parts.b.forward(rows, [Group(batch.ragged.lengths, middle)], keep=True))
        answer = self._message(self.maths.codec, tape.output)
        judged = self.maths.loss(sent, answer, place)
        assert judged.data is not None, "the gradient stays finite"
        assert judged.loss is not None, "the loss stays finite"
        grad = self._decode(self.maths.gradient_codec, judged.data, len(batch.token_ids))
        back = self._message(self.maths.gradient_codec, finish(tape.backward(grad)))
        ends = self.maths.backward(sent, back)
        self.bytes_up += len(sent.data) + len(judged.data)
        self.bytes_down += len(answer.rows) + len(back.rows)
        count = len(samples)
        return Share(
            member,
            judged.loss,
            judged.targets,
            Contribution(str(index), judged.targets, count, take_gradients(middle)),
            Contribution(str(index), judged.targets, count, ends),
        )

    def _decode(self, codec: Codec, data: Any, rows: int) -> Tensor:
        out = np.empty((rows, self.width), np.float32)
        decode_rows(codec, data, out)
        return torch.from_numpy(out)

    def _message(self, codec: Codec, rows: Tensor) -> Any:
        return SimpleNamespace(codec=codec, rows=encode_rows(codec, rows.detach().numpy()))


@dataclass
class Share:
    """What a member made of one micro-batch."""

    owner: Member
    loss: float
    targets: int
    middle: Contribution
    ends: Contribution


def run_local(setup: Setup) -> tuple[list[float], list[Mapping[str, Tensor]], LocalJob]:
    """Run a setup; give its loss curve, the adapters of each model that came out, and the job."""
    job = LocalJob(setup)
    curve = job.run()
    members = job.members[:1] if job.config.shares_all else job.members
    return curve, [member.weights() for member in members], job
