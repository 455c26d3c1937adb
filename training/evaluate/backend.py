"""What an evaluation asks of a model, however it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from training.tasks.examples import Sample

# Told how many examples are done.
Progress = Callable[[int], None]


class Backend(Protocol):
    """A model that can be asked. Both answer in the order of the questions, and work on many of them at once."""

    async def likelihoods(self, groups: Sequence[Sequence[Sample]], progress: Progress) -> list[list[float]]:
        """Give the log-probability (natural, summed over its targets) of each sample; groups share a prompt."""
        ...

    async def continuations(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress
    ) -> list[list[int]]:
        """Give the greedy continuation of each prompt up to an end token, which is left out."""
        ...
