"""Several drafters as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edge_client.speculation.drafter import Drafter, DraftRequest, Guesses
from edge_client.speculation.prompt_lookup import LONGEST_CHAIN, PromptLookup
from edge_client.speculation.tree import GuessTree

# How far prompt lookup is believed beside a head, which judges by the state rather than by the wording: its chances
# are multiplied by this. A place where both say the same is likely either way.
LOOKUP_TRUST = 0.5


class CombinedDrafter:
    """Merges a chain from prompt lookup into another drafter's tree.

    At each token of the chain the two are mixed: with the lookup's chance `w` its token comes, else the tree decides.
    So the lookup's token gets `w + (1 - w) h` where the tree gave it `h`, and its siblings `(1 - w)` of theirs.
    """

    def __init__(self, lookup: PromptLookup, other: Drafter, *, trust: float = LOOKUP_TRUST) -> None:
        assert 0 <= trust <= 1, "a share"
        self._lookup = lookup
        self._other = other
        self._trust = trust

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        """Guess for each request; see `Drafter.propose`."""
        trees = self._other.propose(requests)
        return [self._merge(request, guesses) for request, guesses in zip(requests, trees, strict=True)]

    def _merge(self, request: DraftRequest, guesses: Guesses) -> Guesses:
        tokens, chances = self._lookup.conditionals(request.tokens, LONGEST_CHAIN)
        tree = _as_tree(guesses)
        parent = -1
        for token, chance in zip(tokens, chances, strict=True):
            weight = self._trust * chance
            node = tree.find(parent, token)
            for sibling in tree.children(parent):
                tree.conditionals[sibling] *= 1 - weight
            if node is None:
                node = tree.add(parent, token, weight)
            else:
                tree.conditionals[node] += weight
            parent = node
        return tree.best(request.max_guesses, request.min_chance)


def _as_tree(guesses: Guesses) -> GuessTree:
    tree = GuessTree()
    for token, parent, chance in zip(guesses.tokens, guesses.parents, guesses.chances, strict=True):
        above = guesses.chances[parent] if parent >= 0 else 1.0
        tree.add(parent, token, min(1.0, chance / above) if above > 0 else 0.0)
    return tree
