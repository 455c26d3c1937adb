"""From logits to tokens: the walk through a draft that was verified, and the wish for the next one.

At each node of the draft the turn samples from the model's own distribution behind that node, once. If the token
sampled was guessed, the walk goes on at that guess, else it ends. This is rejection sampling against a drafter that
puts all its probability on its guesses (Leviathan et al. 2023; Chen et al. 2023): a guess is accepted with just its
probability under the model, and what replaces a rejected one is distributed as the model has it. And more: every
token costs one draw, as without drafts, so that even the random numbers agree: a seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from edge_client.draft import Decision, Draft
from edge_client.speculation.drafter import DraftRequest
from edge_client.speculation.pace import Round, Wish
from edge_client.turn import Turn


class Pace(Protocol):
    """Says when to draft and how much; see `edge_client.speculation.pace.DraftPace`."""

    def wish(self) -> Wish:
        """What the next round should be."""
        ...

    def observe(self, this: Round) -> None:
        """Take what a round brought."""
        ...


class Decoder:
    """One answer's decisions. Runs in the worker's thread.

    `pace` says how much to guess, never without one. A step carries `max_rows` rows, the context has `max_length`
    positions.
    """

    def __init__(
        self, turn: Turn, prompt_ids: Sequence[int], *, pace: Pace | None, max_rows: int, max_length: int
    ) -> None:
        self._turn = turn
        self._tokens = list(prompt_ids)
        self._pace = pace
        self._max_rows = max_rows
        self._max_length = max_length

    def decide(self, draft: Draft | None, logits: Tensor, states: Tensor) -> Decision:
        """Sample behind `draft`, or behind the prompt if there is none.

        `logits [n, vocab]` and `states [n, d]`, float32, are those of the draft's nodes; without one of the last row.
        """
        node, path = 0, [0]
        while True:
            fed = self._turn.choose(logits[node])
            if not fed:
                return Decision(tuple(path))
            (token,) = fed
            self._tokens.append(token)
            child = draft.child(node, token) if draft is not None else None
            if child is None:
                return Decision(tuple(path), token, self._wish(states[node]))
            node = child
            path.append(node)

    def _wish(self, state: Tensor) -> DraftRequest | None:
        if self._pace is None:
            return None
        wish = self._pace.wish()
        # The last token of an answer is sampled, never fed; the one to be fed takes the position len(tokens) - 1.
        most = min(wish.max_guesses, self._turn.remaining - 1, self._max_rows - 1, self._max_length - len(self._tokens))
        if most < 1:
            return None
        return DraftRequest(self._tokens, state, most, wish.min_chance)
