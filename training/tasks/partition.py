"""One data set dealt out to many clients: alike (iid), or each with its own share of the labels (non-iid)."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from split_llama.errors import UsageError
from training.tasks.examples import AnyExample

HOWS = "'iid', 'dirichlet:ALPHA' (ALPHA > 0, usually 0.1 to 1) or 'shards:N' (N >= 1 for each client)"
DEFAULTS = {"dirichlet": 0.5, "shards": 2.0}


@dataclass(frozen=True, slots=True)
class Dealing:
    """How to deal: `iid`; `dirichlet` by label with concentration `value`; `shards`, `value` of them to each client."""

    kind: str
    value: float

    @classmethod
    def parse(cls, how: str) -> Dealing:
        """Read "iid", "dirichlet", "dirichlet:0.3", "shards" or "shards:2". Raises `UsageError`."""
        kind, colon, number = how.partition(":")
        if kind == "iid" and not colon:
            return cls("iid", 0.0)
        if kind in DEFAULTS and not colon:
            return cls(kind, DEFAULTS[kind])
        try:
            value = float(number) if kind == "dirichlet" else float(int(number))
        except ValueError:
            value = 0.0
        if kind not in DEFAULTS or not 0 < value <= 1e6:
            raise UsageError(f"data is dealt out by {HOWS}, found {how!r}")
        return cls(kind, value)


def partition(examples: Sequence[AnyExample], clients: int, how: str, seed: int) -> list[list[AnyExample]]:
    """Deal `examples` out to `clients` lists: every example to one client, at least one to each, in the given order.

    - "iid": at random, in shares that differ by one example at most.
    - "dirichlet:A": the clients' shares of every label are drawn from a symmetric Dirichlet distribution with
      concentration A; small A means few clients for a label, and shares of unequal size.
    - "shards:N": sorted by label and cut into N * clients runs of equal size (to one example), N of which go to each
      client (McMahan et al. 2017).

    Equal arguments give equal lists. Raises `UsageError`, also for labels that are missing where they are needed.
    """
    dealing = Dealing.parse(how)
    runs = clients * int(dealing.value) if dealing.kind == "shards" else clients
    if clients < 1 or len(examples) < runs:
        what = f"{runs} shards" if dealing.kind == "shards" else f"{clients} clients"
        raise UsageError(f"{len(examples)} examples cannot be dealt out to {what}: one for each is the least")
    rng = random.Random(f"partition/{how}/{clients}/{seed}")
    if dealing.kind == "iid":
        owners = _deal(rng, list(range(len(examples))), clients)
    elif dealing.kind == "shards":
        owners = _shards(rng, _by_label(examples, how), clients, int(dealing.value))
    else:
        owners = _dirichlet(rng, _by_label(examples, how), clients, dealing.value)
    return [[examples[index] for index in sorted(own)] for own in owners]


def label_counts(examples: Sequence[AnyExample]) -> dict[str, int]:
    """How many examples there are of each label, by name: what a report shows of a client's share."""
    return dict(sorted(Counter(example.label for example in examples).items()))


def _by_label(examples: Sequence[AnyExample], how: str) -> list[list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        if not example.label:
            raise UsageError(f"{how!r} deals by label, but example {index} has none: deal this data out by 'iid'")
        found[example.label].append(index)
    return [found[label] for label in sorted(found)]


def _deal(rng: random.Random, indices: list[int], hands: int) -> list[list[int]]:
    rng.shuffle(indices)
    return [indices[hand::hands] for hand in range(hands)]


def _shards(rng: random.Random, groups: list[list[int]], clients: int, each: int) -> list[list[int]]:
    for group in groups:
        rng.shuffle(group)
    indices = [index for group in groups for index in group]
    count = clients * each
    cuts = [len(indices) * shard // count for shard in range(count + 1)]
    dealt = _deal(rng, list(range(count)), clients)
    return [[index for shard in own for index in indices[cuts[shard] : cuts[shard + 1]]] for own in dealt]


def _dirichlet(rng: random.Random, groups: list[list[int]], clients: int, alpha: float) -> list[list[int]]:
    owners: list[list[int]] = [[] for _ in range(clients)]
    for group in groups:
        rng.shuffle(group)
        cuts = [0, *(round(len(group) * share) for share in accumulate(_shares(rng, clients, alpha)))]
        cuts[-1] = len(group)
        for own, (begin, end) in zip(owners, pairwise(cuts), strict=True):
            own += group[begin:end]
    # A client without data could not take part.
    for own in owners:
        if not own:
            own.append(max(owners, key=len).pop())
    return owners


def _shares(rng: random.Random, clients: int, alpha: float) -> list[float]:
    drawn = [rng.gammavariate(alpha, 1.0) for _ in range(clients)]
    total = sum(drawn)
    if total <= 0:  # all of them underflow for tiny alpha, where the limit is one client for each label
        drawn[rng.randrange(clients)] = total = 1.0
    return [value / total for value in drawn]
