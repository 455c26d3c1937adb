"""What a job computes of its micro-batches, as generators for the thread that computes: decoded, run, encoded there.

One client's fault is its own: states or gradients that cannot be used leave the others in the pass as they are.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from split_llama.config import BlockRange
from split_llama.errors import NonFiniteStates, RequestRefused
from split_llama.wire.codec import Codec, Floats, decode_rows, encode_rows
from training.compute.lora import DropoutKey, Group
from training.compute.tape import Tape
from training.job_config import JobConfig
from training.server.records import Micro, Rows
from training.server.sets import WeightSets


class Blocks(Protocol):
    """What computes the blocks: `training.compute.tape.Trunk`, or something that takes its place."""

    def forward(
        self, rows: Tensor, groups: Sequence[Group], *, keep: bool, span: BlockRange | None = None
    ) -> Generator[None, None, Tape]:
        """Run rows `[N, d]` through `span`; see `Trunk.forward`."""
        ...

    def block_bytes(self, groups: Sequence[Group], *, keep: bool) -> int:
        """Estimate what is held for each block until the backward; see `Trunk.block_bytes`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """A forward that waits for its backward: whose rows are where in it."""

    tape: Tape
    groups: Mapping[Micro, Group]

    @property
    def nbytes(self) -> int:
        """About what is held, in bytes."""
        return self.tape.nbytes


@dataclass(slots=True, eq=False)
class Results:
    """What became of a cohort's members: encoded rows, or why there are none."""

    rows: dict[Micro, bytes] = field(default_factory=dict)
    failures: dict[Micro, RequestRefused] = field(default_factory=dict)


class Passes:
    """The passes of one job over `span`. `names` gives the clients' names by their numbers."""

    def __init__(
        self,
        blocks: Blocks,
        span: BlockRange,
        sets: WeightSets,
        config: JobConfig,
        names: Mapping[int, str],
        *,
        width: int,
        device: torch.device,
    ) -> None:
        self._blocks = blocks
        self._span = span
        self._sets = sets
        self._config = config
        self._names = names
        self._width = width
        self._device = device
        self._codec = Codec.parse(config.codec)
        self._gradient_codec = Codec.parse(config.gradient_codec)

    def forward(
        self, members: Sequence[Micro], inputs: Sequence[Rows], *, keep: bool
    ) -> Generator[None, None, tuple[Pass | None, Results]]:
        """Take micro-batches forward in one pass and encode the rows that come out; no pass if none can be used."""
        results = Results()
        states = self._decoded(members, inputs, results)
        yield
        if not states:
            return None, results
        the_pass = yield from self._run(states, keep=keep)
        start = 0
        for micro in states:
            self._encode(micro, the_pass.tape.output[start : start + micro.count], self._codec, results)
            start += micro.count
        return the_pass, results

    def backward(
        self,
        the_pass: Pass | None,
        members: Sequence[Micro],
        inputs: Sequence[Rows],
        gradients: Sequence[Rows],
        *,
        keep: bool,
    ) -> Generator[None, None, Results]:
        """Take the gradients of `members` back and add what comes of them to their clients' shares of the step.

        Others in the pass go back with zeros, which adds nothing. Without a pass the forward is computed once more,
        with `keep` as in `forward`.
        """
        results = Results()
        grads = self._decoded(members, gradients, results)
        yield
        if not grads:
            return results
        if the_pass is None:
            states = self._decoded(list(grads), [inputs[members.index(micro)] for micro in grads], Results())
            the_pass = yield from self._run(states, keep=keep)
        back = yield from the_pass.tape.backward(self._laid_out(the_pass, grads))
        start = 0
        for micro, group in the_pass.groups.items():
            if micro in grads:
                self._add(micro, group, back[start : start + micro.count], results)
            start += micro.count
        return results

    def held_bytes(self, members: Sequence[Micro], *, keep: bool) -> int:
        """Estimate what a pass of these will hold until its backward."""
        groups = [Group(micro.lengths, self._sets.weights(micro.client), self._dropout(micro)) for micro in members]
        output = sum(micro.count for micro in members) * self._width * torch.float32.itemsize
        return len(self._span) * self._blocks.block_bytes(groups, keep=keep) + output

    def _run(self, states: Mapping[Micro, Floats], *, keep: bool) -> Generator[None, None, Pass]:
        groups = {
            micro: Group(micro.lengths, self._sets.leaves(micro.client), self._dropout(micro)) for micro in states
        }
        rows = torch.from_numpy(np.concatenate(list(states.values()))).to(self._device)
        tape = yield from self._blocks.forward(rows, list(groups.values()), keep=keep, span=self._span)
        return Pass(tape, groups)

    def _dropout(self, micro: Micro) -> DropoutKey | None:
        if not self._config.lora.dropout:
            return None
        return DropoutKey(self._config.seed, self._names[micro.client], micro.step, micro.number)

    def _decoded(self, members: Sequence[Micro], encoded: Sequence[Rows], results: Results) -> dict[Micro, Floats]:
        decoded: dict[Micro, Floats] = {}
        for micro, rows in zip(members, encoded, strict=True):
            values = np.empty((micro.count, self._width), np.float32)
            try:
                decode_rows(rows.codec, rows.data, values)
            except RequestRefused as refusal:
                results.failures[micro] = refusal
            else:
                decoded[micro] = values
        return decoded

    def _laid_out(self, the_pass: Pass, grads: Mapping[Micro, Floats]) -> Tensor:
        """Put gradients where the pass has their rows: float32 `[N, d]`, zeros elsewhere."""
        rows = [grads.get(micro, np.zeros((micro.count, self._width), np.float32)) for micro in the_pass.groups]
        return torch.from_numpy(np.concatenate(rows)).to(self._device)

    def _add(self, micro: Micro, group: Group, back: Tensor, results: Results) -> None:
        gradients = self._sets.gathered(group.weights)
        if not gradients.is_finite:
            results.failures[micro] = NonFiniteStates(
                f"the gradients of micro-batch {micro.number} of step {micro.step} are not finite: it adds nothing"
            )
            return
        self._encode(micro, back, self._gradient_codec, results)
        if micro in results.rows:
            self._sets.add(micro.client, gradients)

    def _encode(self, micro: Micro, rows: Tensor, codec: Codec, results: Results) -> None:
        try:
            results.rows[micro] = encode_rows(codec, rows.to("cpu", torch.float32).numpy())
        except NonFiniteStates as failure:
            results.failures[micro] = failure
