"""A job's weight sets: LoRA weights with their optimizer, and the gradients that clients add to a step.

One set is shared by all clients, or each has its own and they are averaged now and then. All of it belongs to the
thread that computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from split_llama.errors import CheckpointError
from training.compute.aggregate import Combined, Contribution, Rule, combine
from training.compute.averaging import average
from training.compute.flat import FlatTensors, Layout
from training.compute.lora import leaves_of, recording, take_gradients
from training.compute.optimizer import AdapterOptimizer
from training.compute.schedule import learning_rate
from training.job_config import JobConfig
from training.server.adapters import AdapterPlan

Tensors = Mapping[str, Tensor]

# The name of the one set that all share.
SHARED = "shared"
AVERAGE = "average/"

NOTHING_LEARNED = "no micro-batch of it gave a finite loss and gradient"
NOT_FINITE = "its gradient is not finite"


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What a client's commit brings: tokens and samples of its share, and A's and C's tensors where they are shared.

    `ends` are gradients, or weights where own sets are averaged; null where they are not finite.
    """

    client: int
    targets: int
    samples: int
    ends: Tensors | None


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step did. `skipped` and `clipped` are by client; `stayed` says why the weights are as they were."""

    learning_rate: float
    norm: float | None
    skipped: Mapping[int, str]
    clipped: Mapping[int, float]
    stayed: str | None


class WeightSets:
    """The sets of one job: one that all share, or `own` ones, and then the newest average of all.

    There is nothing in them before `reset` or `load`.
    """

    def __init__(self, plan: AdapterPlan, config: JobConfig, device: torch.device, *, own: bool) -> None:
        self._plan = plan
        self._config = config
        self._device = device
        self._own = own
        self._trunk = Layout(plan.trunk)
        self._ends = Layout(plan.ends)
        self._all = Layout({**plan.trunk, **plan.ends})
        self._average = FlatTensors.of({})
        self._sets: dict[str, AdapterOptimizer] = {}
        self._gradients: dict[int, FlatTensors] = {}
        self._samples: dict[int, int] = {}

    def _make(self, key: str, first: Tensors) -> None:
        """Make a set. One without weights (no segment of it has adapters) has nothing to keep."""
        params = {name: first[name] for name in (self._trunk if self._own else self._all).names}
        if params:
            self._sets[key] = AdapterOptimizer(params, self._config.optimizer)

    def _key(self, client: int) -> str:
        return str(client) if self._own else SHARED

    # Passes

    def weights(self, client: int) -> Tensors:
        """Give what a pass of a client's rows reads: its set's weights, or none where no block of B has adapters."""
        optimizer = self._sets.get(self._key(client))
        return optimizer.weights if optimizer is not None and self._trunk.size else {}

    def leaves(self, client: int) -> dict[str, Tensor]:
        """Give leaves of B's weights for one pass of a client's rows; they share the storage of its set."""
        weights = self.weights(client)
        return leaves_of({name: weights[name] for name in self._trunk.names})

    def gathered(self, leaves: Tensors) -> FlatTensors:
        """Take the gradients that leaves have gathered."""
        return self._trunk.pack(take_gradients(leaves))

    def add(self, client: int, gradients: FlatTensors) -> None:
        """Add a micro-batch's gradients, as `gathered` gave them, to a client's share of the step under way."""
        known = self._gradients.setdefault(client, gradients)
        if known is not gradients:
            with recording(graph=False):
                known.flat.add_(gradients.flat)

    def drop_gradients(self, clients: Iterable[int] | None = None) -> None:
        """Forget the shares of clients in the step under way; of all unless some are named."""
        for client in list(self._gradients) if clients is None else clients:
            self._gradients.pop(client, None)

    # Steps

    def step(self, step: int, offers: Sequence[Offer]) -> Stepped:
        """Make optimizer step `step` of the set that the clients share, from what they added to it."""
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        skipped = {offer.client: NOTHING_LEARNED for offer in offers if not offer.targets}
        skipped |= {offer.client: NOT_FINITE for offer in offers if offer.ends is None and not self._own}
        used = [self._contribution(offer) for offer in offers if offer.client not in skipped]
        combined = combine(used, Rule.of(self._config))
        self.drop_gradients(offer.client for offer in offers)
        skipped |= {int(client): NOT_FINITE for client in combined.dropped}
        for offer in offers:
            if offer.client not in skipped:
                self._samples[offer.client] = self._samples.get(offer.client, 0) + offer.samples
        norm, stayed = self._apply(offers, combined, rate)
        clipped = {int(entry.client): entry.norm for entry in combined.clipped}
        return Stepped(rate, norm, skipped, clipped, stayed)

    def _contribution(self, offer: Offer) -> Contribution:
        grads = self._gradients.get(offer.client)
        if grads is None:
            grads = self._trunk.zeros(self._device)
        if not self._own:
            grads = self._all.joined(grads, self._end_tensors(offer))
        return Contribution(str(offer.client), offer.targets, offer.samples, grads)

    def _end_tensors(self, offer: Offer) -> FlatTensors:
        return self._ends.pack(_to(offer.ends or {}, self._device))

    def _apply(self, offers: Sequence[Offer], combined: Combined, rate: float) -> tuple[float | None, str | None]:
        if not combined.targets:
            return None, "nobody's share of the step could be used"
        optimizer = self._sets.get(self._key(offers[0].client))
        if optimizer is None:
            return None, None
        report = optimizer.step(combined.flat, rate)
        return (report.norm, None) if report.applied else (None, "the gradient of the step is not finite")

    # Averaging

    def meet(self, offers: Sequence[Offer]) -> dict[int, str]:
        """Average the sets of those who offer, by their samples since the last time; all sets go on from it.

        Gives who was left out, and why.
        """
        joined = [offer for offer in offers if offer.ends is not None]
        shares = [float(self._samples.get(offer.client, 0)) for offer in joined]
        if joined:
            weights = [self._all.joined(self._values(offer.client), self._end_tensors(offer)) for offer in joined]
            shares = shares if any(shares) else [1.0] * len(shares)
            self._average = average(weights, shares, Rule.of(self._config))
            for optimizer in self._sets.values():
                optimizer.replace(self._average.head(self._trunk))
            self._samples.clear()
        return {offer.client: NOT_FINITE for offer in offers if offer.ends is None}

    def _values(self, client: int) -> FlatTensors:
        optimizer = self._sets.get(self._key(client))
        return optimizer.values if optimizer is not None else FlatTensors.of({})

    def seat(self, clients: Iterable[int]) -> None:
        """With own sets: keep those of `clients` only; who has none begins with the newest average."""
        if not self._own:
            return
        keys = {str(client) for client in clients}
        for key in set(self._sets) - keys:
            del self._sets[key]
        for key in sorted(keys - set(self._sets)):
            self._make(key, self._average)
            self._samples.pop(int(key), None)

    # What others get and what is kept

    def adapters(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Give copies, on the CPU, of what all share: the weights of the shared set, or the newest average.

        Of all unless some are named.
        """
        source = self._average if self._own else self._values(0)
        with recording(graph=False):
            return {name: source[name].to("cpu", copy=True) for name in (source if names is None else names)}

    def tensors(self) -> dict[str, Tensor]:
        """Give copies of everything: all that `load` needs."""
        with recording(graph=False):
            stored = {AVERAGE + name: tensor.clone() for name, tensor in self._average.items()}
        for key, optimizer in self._sets.items():
            stored |= {f"set.{key}/{name}": tensor for name, tensor in optimizer.tensors().items()}
        return stored

    def load(self, tensors: Tensors, clients: Iterable[int]) -> None:
        """Restore what `tensors` gave, for `clients`; with own sets a client without one gets the average.

        Raises `CheckpointError` where it does not fit.
        """
        seats = list(clients)
        self.reset(seats)
        with recording(graph=False):
            kept = {name: tensor.to(self._device) for name, tensor in _part(tensors, AVERAGE).items()}
        layout = self._average.layout
        if layout.misfit(kept) is not None:
            raise CheckpointError("the checkpoint's average is of other adapters than this job's")
        self._average = layout.pack(kept)
        for key, optimizer in self._sets.items():
            stored = _part(tensors, f"set.{key}/")
            if stored or not self._own:
                optimizer.load(stored)
            else:
                optimizer.replace(self._average.head(self._trunk))

    def reset(self, clients: Iterable[int]) -> None:
        """Go to where everything begins."""
        with recording(graph=False):
            first = {name: tensor.to(self._device) for name, tensor in self._plan.first(self._config.seed).items()}
        self._average = self._all.pack(first) if self._own else FlatTensors.of({})
        self._sets.clear()
        self._gradients.clear()
        self._samples.clear()
        for key in map(str, clients) if self._own else (SHARED,):
            self._make(key, first)


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
