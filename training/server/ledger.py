"""What clients have sent in one generation of a job: shares of the steps under way, and how far each set is. Pure.

Whatever is asked for every message and every pass costs what a client may have under way, never what a whole step has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from split_llama.errors import BadRequest, UnknownStep, WindowExceeded
from split_llama.wire.training import Backward, Commit, Forward, Message
from training.job_config import JobConfig
from training.server.records import OWED, SETTLED, Micro, Phase, Rows, Share
from training.strategy import Strategy, contributors

# Steps beside the one under way of which a client may have sent something. Who has nothing to compute commits ahead.
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
        self._shares: dict[int, dict[int, Share]] = {client: {} for client in steps}
        self._unsettled: dict[int, list[Micro]] = {client: [] for client in steps}
        self._last: dict[int, Share] = {}
        # How many messages came: what is to be done next may differ only after another one, or with time.
        self.messages = 0
        if strategy.own_sets:
            self.tracks = [Track((client,), step, now) for client, step in sorted(steps.items())]
        else:
            self.tracks = [Track(tuple(sorted(steps)), min(steps.values()), now)]
        self._track_of = {client: track for track in self.tracks for client in track.clients}

    # What comes

    def forward(self, client: int, header: Forward, seq: int, rows: Rows, now: float) -> None:
        """Take in a micro-batch's states. Those of a step that was closed without the client are dropped.

        Raises `BadRequest`, `WindowExceeded`.
        """
        self.messages += 1
        share = self._share_to_be(client, header.step)
        if share is None or share.out:
            return
        number, of = header.micro, self._config.accumulate
        if header.of != of or number >= of:
            raise BadRequest(f"a step has {of} micro-batches in this job; number {number} of {header.of} came")
        if share.commit is not None or number in share.micros:
            raise BadRequest(f"micro-batch {number} of step {header.step} came before, or after the step's commit")
        if self.under_way(client) >= self._config.max_micros:
            raise WindowExceeded(f"{self._config.max_micros} micro-batches may be under way; wait for answers")
        micro = Micro(client, header.step, number, header.targets, header.lengths, seq, rows, now)
        share.add(micro)
        self._unsettled[client].append(micro)
        self._keep(share)

    def backward(self, client: int, header: Backward, seq: int, rows: Rows | None, now: float) -> Message | None:
        """Take in a micro-batch's gradient, or that there is none; give the answer again if it has been added already.

        Raises `UnknownStep`, `BadRequest`.
        """
        self.messages += 1
        share = self._shares[client].get(header.step) or self._last_share(client, header.step)
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
        share = self._share_to_be(client, header.step)
        if share is None or share.out or share.commit is not None:
            return
        if tensors is not None and header.step > self._track_of[client].step:
            raise BadRequest(f"step {header.step} was committed before step {header.step - 1} was closed")
        share.commit, share.tensors, share.committed_at = header, tensors, now
        for micro in self.unsettled(share):
            if micro.phase is not Phase.RETURNED:
                micro.settle(Phase.VOID)
        self._keep(share)

    def reject(self, client: int, step: int) -> None:
        """Leave a client out of a step that it has committed with what cannot be used.

        Raises `BadRequest`, `WindowExceeded`.
        """
        self.messages += 1
        share = self._share_to_be(client, step)
        if share is not None and share.commit is None:
            self.leave_out([share])
            self._keep(share)

    def _share_to_be(self, client: int, step: int) -> Share | None:
        """Give a client's share of a step, none for one that is closed; a new one is kept only by `_keep`.

        Raises `BadRequest` if it has none, `WindowExceeded` if it has too many.
        """
        closed, shares = self._track_of[client].closed, self._shares[client]
        if step <= closed:
            return None
        if step > self._config.steps:
            raise BadRequest(f"the job has {self._config.steps} steps; step {step} came")
        if step in shares:
            return shares[step]
        if client not in contributors(self._strategy, step, self._present):
            raise BadRequest(f"client {client} has no share in step {step}")
        if step > closed + 1 and len(shares) - (closed + 1 in shares) >= MAX_AHEAD:
            raise WindowExceeded(f"{MAX_AHEAD} steps may be sent ahead; wait until step {closed + 1} is closed")
        return Share(client, step)

    def _keep(self, share: Share) -> None:
        self._shares[share.client][share.step] = share

    # What is under way

    def forget_answers(self, newest: Micro) -> None:
        """Keep a client's answers for the case that they are asked for again, but no more than may be under way."""
        share = self._shares[newest.client].get(newest.step)
        if share is not None and newest.answer is not None:
            share.answered.append(newest)
            while len(share.answered) > self._config.max_micros:
                share.answered.popleft().answer = None

    def unsettled(self, share: Share) -> list[Micro]:
        """Give the micro-batches of a share of which something is still to come or to be done."""
        return [micro for micro in self._of_client(share.client) if micro.step == share.step]

    def is_settled(self, share: Share) -> bool:
        """Say whether everything that the client took back has been added."""
        return not self.unsettled(share)

    def waiting(self, share: Share) -> list[Micro]:
        """Give those of a share that are to go forward."""
        return [micro for micro in self.unsettled(share) if micro.phase is Phase.WAITING]

    def under_way(self, client: int) -> int:
        """Say how many of a client's micro-batches have no answer to their backward yet."""
        return len(self._of_client(client))

    def may_send(self, client: int) -> bool:
        """Say whether a client's next states may come without an answer to what it sent; for own sets."""
        track = self._track_of[client]
        if track.met_at is not None or track.step > self._config.steps:
            return False
        share = self._shares[client].get(track.step)
        if share is None:
            return True
        if not share.is_open:
            return False
        if len(share.micros) < self._config.accumulate:
            return self.under_way(client) < self._config.max_micros
        return self.is_settled(share)

    def is_busy(self, client: int) -> bool:
        """Say whether a client has answers to come: it is not its own move."""
        if any(micro.phase in OWED for micro in self._of_client(client)):
            return True
        track = self._track_of[client]
        share = next((share for share in self.contributors_of(track) if share.client == client), None)
        return share is None or not share.is_open

    @property
    def input_bytes(self) -> int:
        """Bytes of all states and gradients that clients sent and that are still needed, and of answers kept."""
        micros = sum(micro.nbytes for client in self._unsettled for micro in self._of_client(client))
        return micros + sum(micro.nbytes for share in self._all_shares() for micro in share.answered)

    def _of_client(self, client: int) -> list[Micro]:
        """Give a client's micro-batches that live. They end in many places, so it is seen here that they did."""
        alive = [micro for micro in self._unsettled[client] if micro.phase not in SETTLED]
        self._unsettled[client] = alive
        return alive

    def _all_shares(self) -> Iterator[Share]:
        for shares in self._shares.values():
            yield from shares.values()
        yield from self._last.values()

    def _was_left_out(self, client: int, step: int) -> bool:
        share = self._shares[client].get(step)
        last = self._last.get(client)
        return (share is not None and share.out) or (last is not None and last.out and step <= last.step)

    def _last_share(self, client: int, step: int) -> Share | None:
        share = self._last.get(client)
        return share if share is not None and share.step == step else None

    # Steps

    @property
    def is_complete(self) -> bool:
        """Say whether the job's last step is closed."""
        return all(track.closed >= self._config.steps for track in self.tracks)

    def closed(self, client: int) -> int:
        """Give the newest step that is closed for a client."""
        return self._track_of[client].closed

    def contributors_of(self, track: Track) -> list[Share]:
        """Give the shares of the step under way, those left out included, in the order of the clients' numbers."""
        step = track.step
        if step > self._config.steps:
            return []
        if self._strategy.own_sets:
            chosen: Iterable[int] = track.clients
        else:
            chosen = sorted(contributors(self._strategy, step, self._present))
        return [self._shares[client].setdefault(step, Share(client, step)) for client in chosen]

    def share(self, client: int, step: int) -> Share:
        """Give a share that there is."""
        return self._shares[client][step]

    def leave_out(self, shares: Iterable[Share]) -> None:
        """Close shares that came too late: nothing of them counts."""
        for share in shares:
            share.out = True
            for micro in self.unsettled(share):
                micro.settle(Phase.VOID)

    def leave_out_until(self, track: Track, step: int) -> None:
        """Close all shares of a track up to a step."""
        for client in track.clients:
            self.leave_out(share for number, share in self._shares[client].items() if number <= step)

    def go_on(self, track: Track, step: int, now: float) -> None:
        """Note that a step is closed."""
        track.closed, track.since, track.met_at = step, now, None
        track.opened.clear()
        for client in track.clients:
            shares = self._shares[client]
            for number in sorted(number for number in shares if number <= step):
                share = self._last[client] = shares.pop(number)
                share.tensors = None
