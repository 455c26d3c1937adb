"""What clients have sent in one generation of a job: shares of the steps under way, and how far each set is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from split_llama.errors import BadRequest, UnknownStep, WindowExceeded
from split_llama.wire.training import Backward, Commit, Forward, Message
from training.job_config import JobConfig
from training.server.records import OWED, SETTLED, Micro, Phase, Rows, Share
from training.strategy import Strategy, contributors

# Steps that a client may commit ahead of the others (it sends nothing else for them, or its window would end before).
MAX_AHEAD = 1024


@dataclass(slots=True, eq=False)
class Track:
    """One weight set's progress: `closed` steps; since when the one under way; since when it waits to be averaged."""

    clients: tuple[int, ...]
    closed: int
    since: float
    opened: set[int] = field(default_factory=set)
    met_at: float | None = None

    @property
    def step(self) -> int:
        """The step under way."""
        return self.closed + 1


class Ledger:
    """`steps` gives for each client that takes part the step after which it goes on."""

    def __init__(self, config: JobConfig, strategy: Strategy, steps: Mapping[int, int], now: float) -> None:
        self._config = config
        self._strategy = strategy
        self._present = frozenset(steps)
        self._shares: dict[tuple[int, int], Share] = {}
        self._last: dict[int, Share] = {}
        # How many messages came: what is to be done next may differ only after another one, or with time.
        self.messages = 0
        if strategy.own_sets:
            self.tracks = [Track((client,), step, now) for client, step in sorted(steps.items())]
        else:
            self.tracks = [Track(tuple(sorted(steps)), min(steps.values()), now)]
        self._track_of = {client: track for track in self.tracks for client in track.clients}

    def forward(self, client: int, header: Forward, seq: int, rows: Rows, now: float) -> None:
        """Take in a micro-batch's states. Those of a step that was closed without the client are dropped.

        Raises `BadRequest`, `WindowExceeded`.
        """
        self.messages += 1
        share = self._open_share(client, header.step)
        if share is None or share.out:
            return
        number, of = header.micro, self._config.accumulate
        if header.of != of or number >= of:
            raise BadRequest(f"a step has {of} micro-batches in this job; number {number} of {header.of} came")
        if share.commit is not None or number in share.micros:
            raise BadRequest(f"micro-batch {number} of step {header.step} came before, or after the step's commit")
        if self.under_way(client) >= self._config.max_micros:
            raise WindowExceeded(f"{self._config.max_micros} micro-batches may be under way; wait for answers")
        share.micros[number] = Micro(client, header.step, number, header.targets, header.lengths, seq, rows, now)

    def backward(self, client: int, header: Backward, seq: int, rows: Rows | None, now: float) -> Message | None:
        """Take in a micro-batch's gradient, or that there is none; give the answer again if it has been added already.

        Raises `UnknownStep`, `BadRequest`.
        """
        self.messages += 1
        share = self._shares.get((client, header.step)) or self._last_share(client, header.step)
        micro = share.micros.get(header.micro) if share is not None else None
        if micro is None:
            if self._was_left_out(client, header.step):
                return None
            raise UnknownStep(f"no states of micro-batch {header.micro} of step {header.step} are held; send FORWARD")
        if micro.phase in (Phase.WAITING, Phase.RUNNING):
            raise UnknownStep(f"micro-batch {header.micro} of step {header.step} has no answer yet; wait for it")
        if micro.phase is not Phase.ANSWERED:
            return micro.answer
        if rows is None:
            micro.settle(Phase.VOID)
            return None
        if rows.count != micro.count:
            raise BadRequest(f"the gradient of {micro.count} states was expected, {rows.count} rows came")
        micro.phase, micro.gradient, micro.back_seq, micro.returned_at = Phase.RETURNED, rows, seq, now
        return None

    def commit(self, client: int, header: Commit, tensors: Any, now: float) -> None:
        """Take in that a client has done its share: what it took back still counts, all else adds nothing.

        Raises `BadRequest`, `WindowExceeded`.
        """
        self.messages += 1
        share = self._open_share(client, header.step)
        if share is None or share.out or share.commit is not None:
            return
        ahead = header.step - self._track_of[client].step
        if ahead > 0 and tensors is not None:
            raise BadRequest(f"step {header.step} was committed before step {header.step - 1} was closed")
        if ahead > MAX_AHEAD:
            raise WindowExceeded(f"step {header.step} is {ahead} steps ahead; {MAX_AHEAD} may be")
        share.commit, share.tensors, share.committed_at = header, tensors, now
        for micro in share.micros.values():
            if micro.phase not in SETTLED and micro.phase is not Phase.RETURNED:
                micro.settle(Phase.VOID)

    def reject(self, client: int, step: int) -> None:
        """Leave a client out of a step that it has committed with what cannot be used. Raises `BadRequest`."""
        self.messages += 1
        share = self._open_share(client, step)
        if share is not None and share.commit is None:
            self.leave_out([share])

    def forget_answers(self, newest: Micro) -> None:
        """Keep a client's answers for the case that they are asked for again, but no more than may be under way."""
        share = self._shares.get((newest.client, newest.step))
        answered = [micro for micro in share.micros.values() if micro.answer is not None] if share is not None else []
        for micro in answered[: -self._config.max_micros]:
            micro.answer = None

    def under_way(self, client: int) -> int:
        """Say how many of a client's micro-batches have no answer to their backward yet."""
        return sum(micro.phase not in SETTLED for micro in self._micros() if micro.client == client)

    def may_send(self, client: int) -> bool:
        """Say whether a client's next states may come without an answer to what it sent; for own sets."""
        track = self._track_of[client]
        if track.met_at is not None or track.step > self._config.steps:
            return False
        share = self._shares.get((client, track.step))
        if share is None:
            return True
        if not share.is_open:
            return False
        if len(share.micros) < self._config.accumulate:
            return self.under_way(client) < self._config.max_micros
        return all(micro.phase in SETTLED for micro in share.micros.values())

    def is_busy(self, client: int) -> bool:
        """Say whether a client has answers to come: it is not its own move."""
        if any(micro.phase in OWED for micro in self._micros() if micro.client == client):
            return True
        track = self._track_of[client]
        share = next((share for share in self.contributors_of(track) if share.client == client), None)
        return share is None or not share.is_open

    @property
    def input_bytes(self) -> int:
        """Bytes of all states and gradients that clients sent and that are still needed."""
        return sum(micro.nbytes for micro in self._micros())

    @property
    def is_complete(self) -> bool:
        """Say whether the job's last step is closed."""
        return all(track.closed >= self._config.steps for track in self.tracks)

    def closed(self, client: int) -> int:
        """Give the newest step that is closed for a client."""
        return self._track_of[client].closed

    def _micros(self) -> Iterator[Micro]:
        for share in self._shares.values():
            yield from share.micros.values()

    def _was_left_out(self, client: int, step: int) -> bool:
        share = self._shares.get((client, step))
        last = self._last.get(client)
        return (share is not None and share.out) or (last is not None and last.out and step <= last.step)

    def _last_share(self, client: int, step: int) -> Share | None:
        share = self._last.get(client)
        return share if share is not None and share.step == step else None

    def _open_share(self, client: int, step: int) -> Share | None:
        """Give a client's share of a step, none for one that is closed. Raises `BadRequest` if it has none."""
        if step <= self._track_of[client].closed:
            return None
        if step > self._config.steps:
            raise BadRequest(f"the job has {self._config.steps} steps; step {step} came")
        if (client, step) not in self._shares:
            if client not in contributors(self._strategy, step, self._present):
                raise BadRequest(f"client {client} has no share in step {step}")
            self._shares[client, step] = Share(client, step)
        return self._shares[client, step]

    def contributors_of(self, track: Track) -> list[Share]:
        """Give the shares of the step under way, those left out included, in the order of the clients' numbers."""
        if track.step > self._config.steps:
            return []
        if self._strategy.own_sets:
            chosen: Iterable[int] = track.clients
        else:
            chosen = sorted(contributors(self._strategy, track.step, self._present))
        return [self._shares.setdefault((client, track.step), Share(client, track.step)) for client in chosen]

    def share(self, client: int, step: int) -> Share:
        """Give a share that there is."""
        return self._shares[client, step]

    def leave_out(self, shares: Iterable[Share]) -> None:
        """Close shares that came too late: nothing of them counts."""
        for share in shares:
            share.out = True
            for micro in share.micros.values():
                if micro.phase not in SETTLED:
                    micro.settle(Phase.VOID)

    def leave_out_until(self, track: Track, step: int) -> None:
        """Close all shares of a track up to a step."""
        self.leave_out(share for key, share in self._shares.items() if key[0] in track.clients and key[1] <= step)

    def go_on(self, track: Track, step: int, now: float) -> None:
        """Note that a step is closed."""
        track.closed, track.since, track.met_at = step, now, None
        track.opened.clear()
        for client, number in [key for key in self._shares if key[0] in track.clients and key[1] <= step]:
            share = self._shares.pop((client, number))
            share.tensors = None
            self._last[client] = share
