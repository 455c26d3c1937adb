"""Training of a draft head on a model's own final states. Deterministic by seed; minutes on a CPU for small models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_client.speculation.draft_head import CALIBRATED_STEPS, DraftHead, HeadShape
from split_llama.errors import UsageError

MAX_VOCABULARY = 4096
LEAST_POSITIONS = 64
# Positions that are held out at most: what is measured there need not be more exact.
MOST_HELD_OUT = 8192
SCALE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. `steps` are those of the unrolled recurrence; a deeper one counts less by `deeper`."""

    seconds: float = 300.0
    steps: int = 5
    batch: int = 256
    epochs: float = 12.0
    rate: float = 2e-3
    weight_decay: float = 0.01
    deeper: float = 0.9
    state_loss: float = 0.2
    held_out: float = 0.1
    vocabulary: int = MAX_VOCABULARY
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ends:
    """The model's embedding `[V, d]` and LM head `[V, d]`, as stored; frozen."""

    embedding: Tensor
    lm_head: Tensor


@dataclass(slots=True)
class Report:
    """What came of it. `accuracy[k]`: how often the head's likeliest token is the model's after k + 1 steps, given that
    the tokens before were right; on held-out sequences."""

    steps: int = 0
    seconds: float = 0.0
    positions: int = 0
    held_out: int = 0
    loss: float = math.nan
    accuracy: list[float] = field(default_factory=list)


Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Positions:
    """Sequences back to back: token ids [N], final states [N, d] of each, and the first position after its sequence."""

    tokens: Tensor
    states: Tensor
    ends: Tensor

    @classmethod
    def join(cls, sequences: Sequence[tuple[Sequence[int], Tensor]]) -> Positions:
        """Put sequences and their states together."""
        lengths = [len(tokens) for tokens, _ in sequences]
        ends = torch.tensor(lengths).cumsum(0)
        return cls(
            torch.tensor([token for tokens, _ in sequences for token in tokens]),
            torch.cat([states for _, states in sequences]),
            ends.repeat_interleave(torch.tensor(lengths)),
        )

    def starts(self) -> Tensor:
        """Positions from which at least one step can be trained: two tokens of the sequence follow."""
        places = torch.arange(len(self.tokens))
        return places[places + 1 < self.ends]


def frequent_tokens(sequences: Sequence[tuple[Sequence[int], Tensor]], size: int, limit: int) -> Tensor:
    """Give the ids of the most frequent tokens, sorted: at most `limit`, all of a vocabulary `size` no larger."""
    if size <= limit:
        return torch.arange(size)
    ids = torch.tensor([token for tokens, _ in sequences for token in tokens])
    counts = torch.bincount(ids, minlength=size)
    used = int((counts > 0).sum())
    return counts.argsort(descending=True, stable=True)[: min(limit, used)].sort().values


def train_head(
    sequences: Sequence[tuple[Sequence[int], Tensor]],
    ends: Ends,
    recipe: Recipe,
    *,
    shape: HeadShape | None = None,
    progress: Progress = lambda share, line: None,
) -> tuple[DraftHead, Tensor, Report]:
    """Train a head on `(token ids, final states [n, d])`; give it, the ids it can guess, and what was measured.

    It learns the model's own distribution over these ids, step by step along the given tokens, and the states.
    Raises `UsageError` where there is too little to learn from.
    """
    usable = [(tokens, states) for tokens, states in sequences if len(tokens) >= 3]
    training, testing = _split(usable, recipe)
    vocabulary = frequent_tokens(training, len(ends.lm_head), recipe.vocabulary)
    run = _Run(training, testing, ends, vocabulary, recipe, shape or HeadShape.usual(ends.lm_head.shape[1]))
    run.train(progress)
    run.calibrate()
    return run.head, vocabulary, run.report


def _split(
    sequences: Sequence[tuple[Sequence[int], Tensor]], recipe: Recipe
) -> tuple[list[tuple[Sequence[int], Tensor]], list[tuple[Sequence[int], Tensor]]]:
    """Hold whole sequences out, drawn by the seed."""
    total = sum(len(tokens) for tokens, _ in sequences)
    if total < LEAST_POSITIONS or len(sequences) < 2:
        raise UsageError(
            f"{len(sequences)} texts with {total} tokens are too little to train a draft head; give at least two texts "
            f"of together {LEAST_POSITIONS} tokens, better some hundred thousand (--text FILE, --samples N)"
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    wanted = min(MOST_HELD_OUT, recipe.held_out * total)
    testing: list[tuple[Sequence[int], Tensor]] = []
    while len(order) > 1 and (not testing or sum(len(tokens) for tokens, _ in testing) < wanted):
        testing.append(sequences[order.pop()])
    return [sequences[index] for index in order], testing


class _Run:
    """One training run."""

    def __init__(
        self,
        training: Sequence[tuple[Sequence[int], Tensor]],
        testing: Sequence[tuple[Sequence[int], Tensor]],
        ends: Ends,
        vocabulary: Tensor,
        recipe: Recipe,
        shape: HeadShape,
    ) -> None:
        self.training, self.testing = Positions.join(training), Positions.join(testing)
        self.recipe = recipe
        self.embedding = ends.embedding
        self.lm_head = ends.lm_head[vocabulary].float()
        self.report = Report(positions=len(self.training.tokens), held_out=len(self.testing.tokens))
        self.generator = torch.Generator().manual_seed(recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.head = DraftHead(shape)
        spread = self.training.states[:: max(1, len(self.training.states) // SCALE_ROWS)].float()
        self.head.scale.copy_(spread.pow(2).mean().sqrt())

    def train(self, progress: Progress) -> None:
        """Take optimiser steps until the epochs or the seconds are used up; the rate falls as a cosine over both."""
        recipe, begin = self.recipe, time.monotonic()
        optimiser = torch.optim.AdamW(self.head.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
        starts = self.training.starts()
        total = max(1, int(recipe.epochs * len(starts) / recipe.batch))
        smooth = math.nan
        for step in range(total):
            spent = (time.monotonic() - begin) / recipe.seconds
            share = max(step / total, spent)
            if share >= 1:
                break
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
            batch = starts[torch.randint(len(starts), (recipe.batch,), generator=self.generator)]
            loss = self._loss(self.training, batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            optimiser.step()
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            self.report.steps, self.report.loss = step + 1, smooth
            if step % 50 == 49:
                progress(share, f"step {step + 1}, loss {smooth:.3f}")
        self.report.seconds = time.monotonic() - begin

    def _unroll(self, data: Positions, batch: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Run the recurrence along the true tokens. Per step: which rows go on, their predicted and true states, and
        their predicted logits; of rows that go on."""
        states = data.states[batch].float()
        memory = self.head.begin(states)
        found = []
        for step in range(1, self.recipe.steps + 1):
            going = (batch + step < data.ends[batch]).nonzero()[:, 0]
            batch, states, memory = batch[going], states[going], memory[going]
            if not len(batch):
                break
            embeddings = F.embedding(data.tokens[batch + step], self.embedding).float()
            states, memory = self.head(states, embeddings, memory)
            found.append((batch, states, data.states[batch + step].float(), states @ self.lm_head.t()))
        return found

    def _loss(self, data: Positions, batch: Tensor) -> Tensor:
        losses = []
        weight = 1.0
        for _, states, truth, logits in self._unroll(data, batch):
            with torch.no_grad():
                wanted = (truth @ self.lm_head.t()).softmax(-1)
            words = F.cross_entropy(logits, wanted)
            near = F.smooth_l1_loss(states / self.head.scale, truth / self.head.scale)
            losses.append(weight * (words + self.recipe.state_loss * near))
            weight *= self.recipe.deeper
        return torch.stack(losses).sum()

    @torch.no_grad()
    def calibrate(self) -> None:
        """Measure the accuracy by depth on the held-out sequences, and fit each step's temperature there."""
        right: list[list[Tensor]] = [[] for _ in range(self.recipe.steps)]
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.recipe.steps)]
        for batch in torch.split(self.testing.starts(), 1024):
            for step, (_, _, truth, logits) in enumerate(self._unroll(self.testing, batch)):
                wanted = truth @ self.lm_head.t()
                right[step].append(logits.argmax(-1) == wanted.argmax(-1))
                kept[step].append((logits, wanted.softmax(-1)))
        self.report.accuracy = [float(torch.cat(hits).float().mean()) for hits in right if hits]
        for step, pairs in enumerate(kept[:CALIBRATED_STEPS]):
            if pairs:
                self.head.temperatures[step:] = _fit_temperature(
                    *(torch.cat(part) for part in zip(*pairs, strict=True))
                )


def _fit_temperature(logits: Tensor, wanted: Tensor) -> float:
    """Give the temperature with the least cross-entropy, by golden sections of its logarithm between 1/4 and 4."""
    low, high = -math.log(4), math.log(4)
    golden = (math.sqrt(5) - 1) / 2

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), wanted))

    for _ in range(16):
        third = golden * (high - low)
        if loss(high - third) < loss(low + third):
            high = low + third
        else:
            low = high - third
    return math.exp((low + high) / 2)
