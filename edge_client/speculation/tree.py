"""Putting guesses together: a tree that grows by (parent, token), of which the likeliest part is taken. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from edge_client.speculation.drafter import Guesses


class GuessTree:
    """Nodes with conditional chances: that of a token, given that all before it were right. Node -1 is the root."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.conditionals: list[float] = []
        self._nodes: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, conditional: float) -> int:
        """Add a node whose parent is there already; give its number. A (parent, token) may come only once."""
        assert -1 <= parent < len(self.tokens), "a parent comes first"
        assert (parent, token) not in self._nodes, "siblings are distinct"
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.conditionals.append(conditional)
        self._nodes[parent, token] = node
        return node

    def find(self, parent: int, token: int) -> int | None:
        """Give the node of `token` after `parent`, if it is there."""
        return self._nodes.get((parent, token))

    def children(self, parent: int) -> Iterator[int]:
        """Yield the nodes right after `parent`."""
        return (node for node, above in enumerate(self.parents) if above == parent)

    def chances(self) -> list[float]:
        """Chance of each node that it and all above it are right."""
        chances: list[float] = []
        for parent, conditional in zip(self.parents, self.conditionals, strict=True):
            chances.append(conditional if parent < 0 else chances[parent] * conditional)
        return chances

    def best(self, max_guesses: int, min_chance: float) -> Guesses:
        """Take the likeliest nodes. As none is likelier than its parent, what is taken is a tree again."""
        chances = self.chances()
        # Equal chances: the earlier node first, which is the parent where one is above the other.
        ranked = sorted(range(len(chances)), key=lambda node: (-chances[node], node))
        kept = [node for node in ranked[:max_guesses] if chances[node] >= min_chance]
        place = {node: index for index, node in enumerate(kept)}
        return Guesses(
            tokens=tuple(self.tokens[node] for node in kept),
            parents=tuple(place.get(self.parents[node], -1) for node in kept),
            chances=tuple(chances[node] for node in kept),
        )
