"""What has to be fed to learn how likely some texts are: alternatives behind one prompt share most of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.tasks.examples import IGNORED, Sample


@dataclass(frozen=True, slots=True)
class Feeds:
    """The sequences to feed for a group of samples.

    `trunk` is how many first tokens all `sequences` have in common, as far as no logits behind them are wanted; the
    last token of the trunk is the first whose logits are. `feed_of` says for each sample which sequence covers it.
    """

    sequences: tuple[tuple[int, ...], ...]
    feed_of: tuple[int, ...]
    trunk: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Feeds:
        """Plan a group. A sample's last token is only predicted, never fed; one that is the beginning of another's
        needs no feed of its own."""
        needed = [sample.token_ids[:-1] for sample in samples]
        longest: list[tuple[int, ...]] = []
        for ids in sorted(set(needed), key=len, reverse=True):
            if not any(other[: len(ids)] == ids for other in longest):
                longest.append(ids)
        feed_of = [next(at for at, feed in enumerate(longest) if feed[: len(ids)] == ids) for ids in needed]
        first = min(first_target(sample) for sample in samples)
        shared = 0
        while shared < min(first, *map(len, longest)) and len({feed[shared] for feed in longest}) == 1:
            shared += 1
        return cls(tuple(longest), tuple(feed_of), shared)

    def wants(self, samples: Sequence[Sample], feed: int) -> list[Sample]:
        """Give the samples that `feed` covers."""
        return [sample for sample, at in zip(samples, self.feed_of, strict=True) if at == feed]


def first_target(sample: Sample) -> int:
    """Give the position of the first token that is learned and predicted; the length where there is none."""
    labels = enumerate(sample.labels)
    return next((at for at, label in labels if at and label != IGNORED), len(sample.labels))


class Likelihood:
    """Adds up the log-probability of samples' targets, float64, as logits of their feed come by."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.totals = [0.0] * len(samples)
        self._samples = samples

    def see(self, first: int, logits: Tensor) -> None:
        """Take `logits [n, vocab]` of the feed's positions from `first` on; each predicts the token behind it."""
        for index, sample in enumerate(self._samples):
            begin, end = first + 1, min(first + 1 + len(logits), len(sample.labels))
            wanted = [at for at in range(begin, end) if sample.labels[at] != IGNORED]
            rows = logits[[at - begin for at in wanted]].double()
            tokens = torch.tensor([sample.labels[at] for at in wanted], dtype=torch.int64, device=logits.device)
            self.totals[index] += float(torch.log_softmax(rows, dim=-1).gather(1, tokens[:, None]).sum())
