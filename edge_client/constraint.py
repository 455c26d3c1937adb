"""What holds an answer to a grammar. The grammars themselves are the gateway's (`edge_client.gateway.grammar`)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The state of one answer's grammar; runs in the worker's thread, once per token, in order."""

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and takes no further token."""
        ...

    def mask(self, logits: Tensor) -> Tensor:
        """Give `logits [vocab]` with minus infinity for every token that cannot come next; `logits` stay as they are.

        Raises `UsageError` when the grammar cannot be followed any further.
        """
        ...

    def take(self, token: int) -> None:
        """Go on behind `token`, the one that was chosen."""
        ...
