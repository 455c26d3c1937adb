"""What a session feeds next: the token just sampled, and guesses at those behind it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.speculation.drafter import DraftRequest, Guesses

NO_GUESSES = Guesses()


@dataclass(frozen=True, slots=True)
class Draft:
    """A sampled token as the root, node 0, and a tree of guesses; guess `i` is node `i + 1`."""

    token: int
    guesses: Guesses = NO_GUESSES

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to guess about: the token's row is settled as soon as it is fed."""
        return not self.guesses.tokens

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token of each node."""
        return (self.token, *self.guesses.tokens)

    @property
    def tree(self) -> tuple[int, ...]:
        """Ancestor bits of each node (see `split_llama.draft_tree`)."""
        return self.guesses.tree()

    def child(self, node: int, token: int) -> int | None:
        """Give the node of `token` right after `node`, if it was guessed."""
        guess = self.guesses.child(node - 1, token)
        return None if guess is None else guess + 1


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of some logits. `path`: the nodes of the pending draft that stay, root first. `token`: what was
    sampled behind them and is fed next, with guesses if there is a `request`; no token when the answer is over."""

    path: tuple[int, ...] = ()
    token: int | None = None
    request: DraftRequest | None = None
