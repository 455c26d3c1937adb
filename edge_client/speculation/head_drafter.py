"""Guessing with a draft head: trees by best-first growth, a level of all sessions' trees at a time."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client.speculation.drafter import DraftRequest, Guesses
from edge_client.speculation.head_file import TrainedHead, ends_digest, load_head
from edge_client.speculation.tree import GuessTree
from split_llama.checkpoint import Checkpoint
from split_llama.errors import ModelMismatch
from split_llama.products import Numerics, Product

DEEPEST = 16
# A matrix of more elements is multiplied as int8, a quarter of the bytes: what is guessed with needs no more.
LARGE = 2**20
BRANCHES = 12


class _Multiply(nn.Module):
    """A frozen matrix with its bias, in the way that multiplies fastest."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias
        self._product: Product | None = None
        if weight.numel() > LARGE:
            self._product = Numerics(torch.float32, "int8", torch.device("cpu")).product(weight, bias)
            self._weight = weight[:0]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply rows."""
        return F.linear(x, self._weight, self._bias) if self._product is None else self._product(x)


@dataclass(slots=True)
class _Growth:
    """One request's tree while it grows; `chances` of its nodes, and those of the likeliest `max_guesses` as a heap."""

    request: DraftRequest
    tree: GuessTree = field(default_factory=GuessTree)
    chances: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    def bar(self) -> float:
        """The chance that a node must have to be one of the likeliest, as far as is known."""
        if len(self.best) < self.request.max_guesses:
            return self.request.min_chance
        return max(self.request.min_chance, self.best[0])

    def add(self, parent: int, token: int, conditional: float) -> int:
        """Add a node."""
        node = self.tree.add(parent, token, conditional)
        chance = conditional * (self.chances[parent] if parent >= 0 else 1.0)
        self.chances.append(chance)
        heapq.heappush(self.best, chance)
        if len(self.best) > self.request.max_guesses:
            heapq.heappop(self.best)
        return node


class HeadDrafter:
    """Proposes trees with a trained head. The model's embedding and LM head come from the edge's checkpoint."""

    def __init__(self, trained: TrainedHead, embedding: Tensor, lm_head: Tensor) -> None:
        """`embedding [V, d]` of any type, `lm_head [v, d]` float32: the rows of the tokens that can be guessed."""
        self._head = copy.deepcopy(trained.head)
        for name in ("read", "write"):
            matrix = getattr(self._head, name)
            setattr(self._head, name, _Multiply(matrix.weight.detach(), matrix.bias.detach()))
        self._vocabulary = trained.vocabulary.tolist()
        self._embedding = embedding
        self._lm_head = _Multiply(lm_head)
        self._branches = min(BRANCHES, len(self._vocabulary))

    @classmethod
    def open(cls, path: Path, checkpoint: Checkpoint) -> HeadDrafter:
        """Load a head from its file for the model of `checkpoint`. Raises as `load_head`."""
        trained = load_head(path, ends_digest(checkpoint))
        return cls.of(trained, checkpoint)

    @classmethod
    def of(cls, trained: TrainedHead, checkpoint: Checkpoint) -> HeadDrafter:
        """Put a head before a model."""
        config = checkpoint.config
        embedding = checkpoint.tensor("model.embed_tokens.weight")
        lm_head = embedding if config.tie_word_embeddings else checkpoint.tensor("lm_head.weight")
        vocabulary = trained.vocabulary
        if trained.head.shape.width != config.hidden_size or not 0 <= int(vocabulary.min()) <= int(
            vocabulary.max()
        ) < len(lm_head):
            raise ModelMismatch(
                f"the draft head is for states of {trained.head.shape.width} values and other tokens; the model has "
                f"{config.hidden_size} and {len(lm_head)} tokens; train one for this model (edge-client train-drafter)"
            )
        drafter = cls(trained, embedding, lm_head[vocabulary].float())
        # The first use of an operator takes many times as long as those after it.
        drafter.propose([DraftRequest((0,), torch.zeros(config.hidden_size), 1, 0.0)])
        return drafter

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        """Grow all requests' trees; see `Drafter.propose`."""
        growths = [_Growth(request) for request in requests]
        # The frontier: whose tree, which node of it (-1: the root), and the state and memory before its token.
        frontier = [(index, -1) for index in range(len(growths))]
        tokens = [request.tokens[-1] for request in requests]
        states = torch.stack([request.state for request in requests]).to("cpu", torch.float32)
        memory = self._head.begin(states)
        for step in range(DEEPEST):
            embeddings = F.embedding(torch.tensor(tokens), self._embedding).float()
            states, memory = self._head(states, embeddings, memory)
            rows = self._grow(growths, frontier, states, step)
            # A node that fell out of the likeliest since has no child among them.
            rows = [row for row in rows if growths[row[1]].chances[row[2]] >= growths[row[1]].bar()]
            if not rows:
                break
            source = torch.tensor([row for row, _, _ in rows])
            states, memory = states[source], memory[source]
            frontier = [(index, node) for _, index, node in rows]
            tokens = [growths[index].tree.tokens[node] for index, node in frontier]
        return [growth.tree.best(growth.request.max_guesses, growth.request.min_chance) for growth in growths]

    def _grow(
        self, growths: Sequence[_Growth], frontier: Sequence[tuple[int, int]], states: Tensor, step: int
    ) -> list[tuple[int, int, int]]:
        """Add the likeliest tokens after each frontier node; give (row of `states`, tree, new node) of each."""
        logits = self._lm_head(states)
        chances = (logits / self._head.temperature(step)).softmax(-1)
        top = chances.topk(self._branches)
        found = []
        lists = zip(frontier, top.values.tolist(), top.indices.tolist(), strict=True)
        for row, ((index, parent), values, places) in enumerate(lists):
            growth = growths[index]
            above = growth.chances[parent] if parent >= 0 else 1.0
            for value, place in zip(values, places, strict=True):
                if above * value < growth.bar():
                    break
                found.append((row, index, growth.add(parent, self._vocabulary[place], value)))
        return found
