"""How clients share a job's optimizer steps: who contributes to which one, and when sets of weights are averaged. Pure.

Steps count from 1. A *weight set* is one copy of the server's adapters. Server and clients ask the same strategy the
same questions, so nobody has to tell the other whose turn it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edge_client.plugins import make_plugin
from split_llama.errors import UsageError
from training.job_config import JobConfig


class Strategy(Protocol):
    """Answers follow from the arguments alone: both sides ask again after every restart."""

    @property
    def own_sets(self) -> bool:
        """Say whether every client trains a weight set of its own; otherwise all share one."""
        ...

    def contributors(self, step: int, present: frozenset[int]) -> frozenset[int]:
        """Give those of `present` whose samples make up a step; never empty. With own sets: all, each for its own."""
        ...

    def averages(self, step: int) -> bool:
        """Say whether all sets meet after this step and go on with their average. Only asked with own sets."""
        ...


@dataclass(frozen=True, slots=True)
class Sequential:
    """One client after the other, `turn_steps` steps each."""

    turn_steps: int = 1
    own_sets: bool = False

    def contributors(self, step: int, present: frozenset[int]) -> frozenset[int]:
        """Give the one whose turn it is."""
        order = sorted(present)
        return frozenset({order[(step - 1) // self.turn_steps % len(order)]})

    def averages(self, step: int) -> bool:
        """Say no: there is one set."""
        return False


@dataclass(frozen=True, slots=True)
class ClientBatch:
    """All clients in every step, in one pass."""

    own_sets: bool = False

    def contributors(self, step: int, present: frozenset[int]) -> frozenset[int]:
        """Give all."""
        return present

    def averages(self, step: int) -> bool:
        """Say no: there is one set."""
        return False


@dataclass(frozen=True, slots=True)
class ServerHierarchical:
    """A set for each client, averaged after every `average_every` steps; the job averages after its last one anyway."""

    average_every: int = 10
    own_sets: bool = True

    def contributors(self, step: int, present: frozenset[int]) -> frozenset[int]:
        """Give all."""
        return present

    def averages(self, step: int) -> bool:
        """Say whether `step` is a multiple of `average_every`."""
        return step % self.average_every == 0


def make_strategy(config: JobConfig) -> Strategy:
    """Give a job's strategy; a plug-in's class is called with the configuration. Raises `UsageError`."""
    if config.strategy == "sequential":
        return Sequential(config.turn_steps)
    if config.strategy == "client-batch":
        return ClientBatch()
    if config.strategy == "server-hierarchical":
        return ServerHierarchical(config.average_every)
    made: Strategy = make_plugin("strategy", config.strategy, "contributors", config)
    if not isinstance(getattr(made, "own_sets", None), bool) or not callable(getattr(made, "averages", None)):
        raise UsageError(
            f"the strategy {config.strategy!r} needs own_sets (true or false) and averages(step) beside contributors()"
        )
    return made


def contributors(strategy: Strategy, step: int, present: frozenset[int]) -> frozenset[int]:
    """Ask a strategy, and see that a plug-in's answer can be worked with. Raises `UsageError`."""
    chosen = frozenset(strategy.contributors(step, present))
    if not chosen or not chosen <= present:
        raise UsageError(
            f"the strategy {type(strategy).__name__} chose the clients {sorted(chosen)} for step {step}; "
            f"some of {sorted(present)} were expected"
        )
    if strategy.own_sets and chosen != present:
        raise UsageError(
            f"the strategy {type(strategy).__name__} has own sets but leaves {sorted(present - chosen)} out of step "
            f"{step}; each of its clients trains in every step"
        )
    return chosen


def averages(config: JobConfig, strategy: Strategy, step: int) -> bool:
    """Say whether all sets meet after this step: where the strategy says so, and at the end."""
    return strategy.own_sets and (step == config.steps or strategy.averages(step))


def last_average(config: JobConfig, strategy: Strategy, step: int) -> int:
    """Give the newest step, up to `step`, after which all sets met; 0 is where they all began."""
    while step > 0 and not averages(config, strategy, step):
        step -= 1
    return step


def checkpoint_due(config: JobConfig, step: int, strategy: Strategy | None = None) -> bool:
    """Say whether everybody keeps the state after `step`: every `checkpoint_every` steps, and at the end.

    With own sets only steps at which they meet count, each of which stands for all those since the meeting before.
    Without `strategy` the configuration's own is made.
    """
    strategy = strategy or make_strategy(config)
    if not strategy.own_sets:
        return step == config.steps or step % config.checkpoint_every == 0
    if not averages(config, strategy, step):
        return False
    before = last_average(config, strategy, step - 1)
    return step == config.steps or step // config.checkpoint_every > before // config.checkpoint_every
