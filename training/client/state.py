"""What a client keeps of a job: its adapters with their optimizer, how far it is in its data, and what it can restore.

Everything here belongs to the thread that computes. A state *after step t* is whole once the client's
own share of t is done (`advance`) and the server said what became of the step (`confirm`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from split_llama.errors import CacheError, CheckpointError
from training.checkpoints import Checkpoints
from training.compute.optimizer import WEIGHT, AdapterOptimizer
from training.compute.schedule import learning_rate
from training.job_config import JobConfig

# A step is confirmed to one client before another, and the link may break in between: the last few can be restored.
LIVE_STEPS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A state at one moment: copies of weights (and moments), and the number of micro-batches of data used."""

    tensors: Mapping[str, Tensor]
    cursor: int


class ClientState:
    """The state of one client. `first` are the adapters' first values by name, `folder` where checkpoints go.

    With `owns_optimizer` the client steps its adapters itself; otherwise new weights come from the server.
    """

    def __init__(
        self, first: Mapping[str, Tensor], config: JobConfig, *, owns_optimizer: bool, folder: Path, owner: str
    ) -> None:
        self._config = config
        self._optimizer = AdapterOptimizer(first, config.optimizer) if owns_optimizer and first else None
        self._plain = {name: tensor.clone() for name, tensor in first.items()} if self._optimizer is None else {}
        self._checkpoints = Checkpoints(folder / "checkpoints", owner)
        # Where it stood when it was told to go: beside the two that everybody has.
        self._leaving = Checkpoints(folder / "left-at", owner)
        self._first = self._now(0)
        self._own = self._first
        self._live: dict[int, Snapshot] = {}
        # Own share done, not confirmed yet: the server may know more than could be heard before a link broke.
        self._ahead: dict[int, Snapshot] = {}
        self.step = 0

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The adapters of A and C as they are now, float32 `[out, r]` and `[r, in]`, on the CPU."""
        return self._plain if self._optimizer is None else self._optimizer.weights

    @property
    def cursor(self) -> int:
        """How many micro-batches of its data the client has used."""
        return self._own.cursor

    def have(self) -> tuple[int, ...]:
        """Name the steps that can be restored, ascending."""
        saved = {*self._checkpoints.steps(), *self._leaving.steps()}
        return tuple(sorted({0, *saved, *self._live, *self._ahead}))

    def advance(self, step: int, grads: Mapping[str, Tensor] | None, targets: int, *, averaged: bool = False) -> bool:
        """Note that the own share of a step is done; give whether the weights were stepped here.

        `grads` are sums over `targets` tokens; `None` where there is nothing to learn from. Where weights are
        `averaged` the step is not whole before the average is there.
        """
        applied = False
        if self._optimizer is not None and grads is not None and targets:
            rate = learning_rate(self._config.optimizer, step, self._config.steps)
            means = {name: grad / targets for name, grad in grads.items()}
            applied = self._optimizer.step(means, rate).applied
        self._own = self._now(self.cursor + self._config.accumulate)
        self._ahead = {} if averaged else {step: self._own}
        return applied

    def confirm(self, step: int, weights: Mapping[str, Tensor] | None) -> None:
        """Note what the server said of a step: it is closed, and these are the weights then, if it owns them."""
        if weights is not None:
            self._replace(weights)
            self._own = self._now(self.cursor)
        self._live[step] = self._own
        self._ahead.pop(step, None)
        for old in sorted(self._live)[:-LIVE_STEPS]:
            del self._live[old]
        self.step = step

    def save(self, step: int) -> None:
        """Write the checkpoint of a confirmed step. Raises `CacheError`."""
        snapshot = self._live[step]
        self._checkpoints.save(step, snapshot.tensors, {"cursor": snapshot.cursor})

    def save_for_return(self) -> None:
        """Write the newest whole states, for a client that is told to go and comes back. Raises `CacheError`."""
        newest = {step: self._live[step] for step in (self.step,) if step in self._live} | self._ahead
        for step, snapshot in sorted(newest.items()):
            self._leaving.save(step, snapshot.tensors, {"cursor": snapshot.cursor})

    def restore(self, step: int, weights: Mapping[str, Tensor] | None) -> None:
        """Go back to the state after `step`; what came later is forgotten. `weights` come where the server owns them.

        Raises `CheckpointError` where there is no such state.
        """
        snapshot = self._find(step)
        self._load(snapshot, weights)
        self._live = {known: value for known, value in self._live.items() if known < step}
        self._live[step] = self._own
        self._ahead.clear()
        self.step = step
        for store in (self._checkpoints, self._leaving):
            store.drop_after(step)

    def go_on(self, step: int, weights: Mapping[str, Tensor] | None) -> None:
        """Take part from `step` on with the newest own state: the others did not wait."""
        newest = self.have()[-1]
        self._load(self._find(newest), weights)
        self._live = {step: self._own}
        self._ahead.clear()
        self.step = step
        # What comes now is another course: a later step of the one that was left must not be taken for one of it.
        for store in (self._checkpoints, self._leaving):
            store.drop_after(step)
        if newest > step:
            with contextlib.suppress(CacheError):
                self._leaving.save(step, self._own.tensors, {"cursor": self._own.cursor})

    def _find(self, step: int) -> Snapshot:
        for kept in (self._live, self._ahead):
            if step in kept:
                return kept[step]
        for store in (self._checkpoints, self._leaving):
            if step in store.steps():
                checkpoint = store.load(step)
                cursor = checkpoint.meta.get("cursor")
                if not isinstance(cursor, int) or cursor < 0:
                    raise CheckpointError(f"the checkpoint of step {step} does not say how much data was used")
                return Snapshot(checkpoint.tensors, cursor)
        if step == 0:
            return self._first
        raise CheckpointError(f"the job goes on from step {step}; there is no state of it here, but of {self.have()}")

    def _load(self, snapshot: Snapshot, weights: Mapping[str, Tensor] | None) -> None:
        if self._optimizer is not None:
            self._optimizer.load(snapshot.tensors)
        else:
            if set(snapshot.tensors) != {WEIGHT + name for name in self._plain}:
                raise CheckpointError("the stored state is not that of these adapters; it has other tensors")
            # In the order there was: a file has its own, and on the wire tensors have no names.
            self._plain = {name: snapshot.tensors[WEIGHT + name].clone() for name in self._plain}
        if weights is not None:
            self._replace(weights)
        self._own = self._now(snapshot.cursor)

    def _replace(self, weights: Mapping[str, Tensor]) -> None:
        if self._optimizer is not None:
            self._optimizer.replace(weights)
        else:
            self._plain = {name: weights[name].clone() for name in self._plain}

    def _now(self, cursor: int) -> Snapshot:
        if self._optimizer is not None:
            return Snapshot(self._optimizer.tensors(), cursor)
        with torch.inference_mode(False), torch.no_grad():
            return Snapshot({WEIGHT + name: tensor.clone() for name, tensor in self._plain.items()}, cursor)
