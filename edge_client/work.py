"""One session's state at the edge, and the pieces of work that a pass over the edge's model is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from edge_client.draft import Decision, Draft
from edge_client.step_log import EncodedRows
from split_llama.engine.sequence import Sequence as Positions
from split_llama.noise import NoiseChain


@dataclass(slots=True)
class LocalSession:
    """One session at the edge: the KV of A and C, how many settled positions it has, the noise of their prefix."""

    a: Positions | None
    c: Positions | None
    noise: NoiseChain | None
    length: int = 0
    draft: Draft | None = None  # fed behind the settled positions; its answer is to come

    def settle(self, path: Sequence[int]) -> None:
        """Keep the nodes `path` of the pending draft, root to leaf, and drop the others."""
        draft, self.draft = self.draft, None
        assert draft is not None, "no draft is pending"
        tokens = draft.tokens
        for sequence in (self.a, self.c):
            if sequence is not None:
                sequence.accept(tuple(path))
        if self.noise is not None:
            self.noise.append(tokens[node] for node in path)
        self.length += len(path)

    def fork(self, at: int) -> LocalSession:
        """Share the first `at` settled positions with a new session."""
        assert self.draft is None, "settle the draft first"
        a = self.a.fork(at) if self.a is not None else None
        c = self.c.fork(at) if self.c is not None else None
        return LocalSession(a, c, self.noise.fork(at) if self.noise is not None else None, at)

    def free(self) -> None:
        """Give the pages back."""
        for sequence in (self.a, self.c):
            if sequence is not None:
                sequence.free()


Decide = Callable[[Tensor, Tensor], Decision]


@dataclass(frozen=True, slots=True)
class Work:
    """One session's share of a pass: run `replies` through C, let `decide` look at the last `rows` of them, then feed
    what it says (or `tokens` of a prompt) to A.

    `decide` gets logits `[rows, vocab]` and the final norm's output `[rows, d]`, both float32; it runs in the worker's
    thread. While a draft is pending the replies are those of its nodes, and all of them are looked at.
    """

    session: LocalSession
    replies: tuple[EncodedRows, ...] = ()
    decide: Decide | None = None
    rows: int = 1
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready to be sent, from position `first` on."""

    first: int
    rows: EncodedRows

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.first + self.rows.count


@dataclass(frozen=True, slots=True)
class Fed:
    """What a work came to: the draft's nodes that stayed, what was fed behind them and its rows (none: it is over).

    `drafting` is the time that guessing took, in seconds, for all sessions of the pass; 0 for one that did not ask.
    """

    path: tuple[int, ...] = ()
    draft: Draft | None = None
    rows: tuple[Encoded, ...] = ()
    drafting: float = 0.0


WorkResult = Fed | Exception


@dataclass(slots=True)
class PhaseTimes:
    """Seconds spent since the start, by phase: `codec` is noise too, `choose` sampling, `draft` guessing."""

    a: float = 0.0
    c: float = 0.0
    head: float = 0.0
    choose: float = 0.0
    draft: float = 0.0
    codec: float = 0.0
