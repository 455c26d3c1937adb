"""A pass through blocks that trains: forward and backward block by block, as generators that can be paused.

A caller drives a generator at its own pace and does other work in between; `finish` runs one to its end. Each block
has a graph of its own, so its memory is free as soon as its backward is done, and nothing of a pass (grad mode, hooks)
is left behind at a pause.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from split_llama.config import BlockRange
from split_llama.errors import UsageError
from split_llama.layers import Block, Segment
from split_llama.lora import LoraConfig
from training.compute.lora import AdaptedBlock, Group, recording
from training.compute.memory import graph_bytes, input_bytes
from training.compute.ragged import Ragged, RaggedAttention

T = TypeVar("T")


def finish(steps: Generator[None, None, T]) -> T:
    """Run a generator to its end and give its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """What all blocks of a pass share: rotary angles, attention, the groups and the blocks that adapt them."""

    blocks: dict[int, tuple[Block, AdaptedBlock]]
    groups: tuple[Group, ...]
    cos: Tensor
    sin: Tensor
    attend: RaggedAttention

    def run(self, index: int, x: Tensor) -> Tensor:
        """Run one block."""
        block, adapted = self.blocks[index]
        with adapted.attached(self.groups):
            out: Tensor = block(index, x, self.cos, self.sin, self.attend)
        return out


@dataclass(slots=True, eq=False)
class _Held:
    """What a block's backward needs: its input, and with a graph its output."""

    index: int
    input: Tensor
    output: Tensor | None


class Tape:
    """A forward that waits for its backward. Drop the tape to give up; what it holds is free then.

    `output` `[N, D]` is detached. `nbytes` is about what is held beyond weights, less with every block gone back.
    """

    def __init__(self, run: _Pass, output: Tensor, held: list[_Held], bytes_per_block: int) -> None:
        self.output = output
        self._run = run
        self._held = held
        self._bytes_per_block = bytes_per_block
        self._spent = False

    @property
    def nbytes(self) -> int:
        """An estimate of the memory held, in bytes."""
        return len(self._held) * self._bytes_per_block + self.output.nbytes

    def backward(self, grad: Tensor) -> Generator[None, None, Tensor]:
        """Take dL/doutput `[N, D]`, yield after every block, and give dL/dinput.

        The gradients of the groups' leaves add to their `.grad`. Raises `UsageError`, at once, for a gradient of
        another shape and for a second backward.
        """
        if self._spent:
            raise UsageError("this forward went back already; a backward is applied once")
        if grad.shape != self.output.shape:
            raise UsageError(
                f"a gradient of the shape {tuple(self.output.shape)} was expected, got {tuple(grad.shape)}"
            )
        self._spent = True
        return self._go_back(_own(grad, self.output.dtype))

    def _go_back(self, grad: Tensor) -> Generator[None, None, Tensor]:
        while self._held:
            grad = self._back_through(self._held.pop(), grad)
            yield
        return grad

    def _back_through(self, held: _Held, grad: Tensor) -> Tensor:
        with recording(graph=True):
            output = held.output
            if output is None:
                held.input.requires_grad_(True)
                output = self._run.run(held.index, held.input)
            torch.autograd.backward(output, grad)
        assert held.input.grad is not None, "every block's output depends on its input"
        return held.input.grad


class Trunk:
    """The blocks of a dense segment (A, B or C), to train adapters in. The base's weights stay as they are.

    Every group goes through all rows of a pass together; base weights may be of a narrower type than the adapters'.
    """

    def __init__(self, segment: Segment, lora: LoraConfig | None) -> None:
        self.segment = segment
        self.lora = lora
        self._blocks: dict[int, tuple[Block, AdaptedBlock]] = {}
        for index, layer in enumerate(segment.layers, segment.blocks.start):
            assert isinstance(layer, Block), "a segment is made of blocks"
            weight = layer.self_attn.qkv_proj.weight
            assert weight is not None, "packed matrices have no backward: load the segment dense"
            assert not weight.is_inference(), "weights loaded in inference mode have no backward"
            self._blocks[index] = (layer, AdaptedBlock(index, layer, lora))

    def forward(
        self, rows: Tensor, groups: Sequence[Group], *, keep: bool, span: BlockRange | None = None
    ) -> Generator[None, None, Tape]:
        """Run rows `[N, D]`, the groups' one after the other, through `span` (all blocks unless given).

        Yields after every block and gives the tape. With `keep` each block's graph is kept for the backward; without,
        only the blocks' inputs, and the backward computes each block once more. Raises `UsageError`, at once, where
        rows and groups do not fit.
        """
        ragged = self._fitting(rows, groups)
        return self._run(self._begin(ragged, groups), _own(rows, self.segment.dtype), span or self.segment.blocks, keep)

    def block_bytes(self, groups: Sequence[Group], *, keep: bool) -> int:
        """Estimate what a pass of these groups will hold for each block until its backward, in bytes."""
        config, dtype = self.segment.config, self.segment.dtype
        ragged = _ragged(groups)
        if not keep:
            return input_bytes(config, ragged.rows, dtype)
        dropped = sum(group.rows for group in groups if group.dropout is not None and group.weights)
        rows, padded = ragged.rows, ragged.padded_rows
        return graph_bytes(config, self.lora, rows=rows, padded_rows=padded, dropped_rows=dropped, dtype=dtype)

    def _run(self, shared: _Pass, x: Tensor, span: BlockRange, keep: bool) -> Generator[None, None, Tape]:
        held: list[_Held] = []
        for index in range(span.start, span.stop):
            with recording(graph=keep):
                output = shared.run(index, x.requires_grad_(keep))
                held.append(_Held(index, x, output if keep else None))
                x = output.detach()
            yield
        return Tape(shared, x, held, self.block_bytes(shared.groups, keep=keep))

    def _fitting(self, rows: Tensor, groups: Sequence[Group]) -> Ragged:
        ragged, width = _ragged(groups), self.segment.config.hidden_size
        if not ragged.rows or rows.shape != (ragged.rows, width):
            raise UsageError(
                f"a pass needs the rows of its groups' sequences, {ragged.rows} of width {width} and at least one; "
                f"got states of the shape {tuple(rows.shape)}"
            )
        return ragged

    def _begin(self, ragged: Ragged, groups: Sequence[Group]) -> _Pass:
        with recording(graph=False):
            cos, sin = self.segment.rotary(ragged.positions(self.segment.device), self.segment.dtype)
            attend = RaggedAttention(ragged, self.segment.config.sliding_windows, self.segment.device)
        return _Pass(self._blocks, tuple(groups), cos, sin, attend)


def _ragged(groups: Sequence[Group]) -> Ragged:
    return Ragged(tuple(length for group in groups for length in group.lengths))


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Give a leaf of its own: what came may belong to somebody, or come out of inference mode."""
    with recording(graph=False):
        return tensor.detach().to(dtype, copy=True)
