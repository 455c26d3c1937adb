"""The order in which a client sees its samples: endless, seeded, and addressed by batch number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from split_llama.errors import UsageError
from training.tasks.examples import Sample


class Order:
    """Batches of `batch_size` samples. Every epoch is a new permutation of all samples, a function of (seed, epoch).

    Batches run on from one epoch into the next, so none is short and no sample is left out. Batch `index` depends on
    nothing but the samples, the batch size and the seed: who resumes needs to remember only how many were taken.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, seed: int) -> None:
        if not samples:
            raise UsageError("there are no samples to train on")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, found {batch_size}")
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        # The epoch of the last batch and its order: a memory of work done, which changes no result.
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def batch(self, index: int) -> list[Sample]:
        """Batch `index`, from 0."""
        if index < 0:
            raise UsageError(f"batches are numbered from 0, found {index}")
        first = index * self._batch_size
        return [self._at(position) for position in range(first, first + self._batch_size)]

    def __iter__(self) -> Iterator[list[Sample]]:
        index = 0
        while True:
            yield self.batch(index)
            index += 1

    def _at(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self._samples))
        if self._shuffled[0] != epoch:
            order = list(range(len(self._samples)))
            # A text as seed is hashed whole; numbers that are summed or multiplied would collide.
            random.Random(f"order/{self._seed}/{epoch}").shuffle(order)
            self._shuffled = epoch, order
        return self._samples[self._shuffled[1][place]]


def batches(samples: Sequence[Sample], batch_size: int, seed: int) -> Order:
    """The endless batches of `samples`; see `Order`. Raises `UsageError` without samples or with an empty batch."""
    return Order(samples, batch_size, seed)
