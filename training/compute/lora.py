"""LoRA that trains: several clients' groups of rows in one pass over the shared base, each with weights of its own.

A group is a run of consecutive rows; its weights are autograd leaves, so gradients stay apart by client even where the
values are the same. The maths and its types are PEFT's (`peft.tuners.lora.Linear`): the input is cast to the adapter's
type (float32), and the sum of both products is rounded to the base's type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from split_llama.layers import Block, FusedLinear
from split_llama.lora import LoraConfig


@contextmanager
def recording(graph: bool) -> Iterator[None]:
    """Record a graph or not, whatever the mode of the calling thread; never hold this over a pause."""
    with torch.inference_mode(False), torch.set_grad_enabled(graph):
        yield


def leaves_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give leaves for a group that share the storage of `weights`, with gradients of their own."""
    with recording(graph=False):
        return {name: weight.detach().requires_grad_(True) for name, weight in weights.items()}


def take_gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the gradients that leaves have gathered, zeros where there are none, and leave them without."""
    taken: dict[str, Tensor] = {}
    with recording(graph=False):
        for name, leaf in leaves.items():
            taken[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = None
    return taken


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """What dropout follows from: the same key gives the same mask again, when recomputing and after a restart.

    Masks of CPUs agree with each other, and so do those of CUDA devices; the two kinds differ.
    """

    seed: int
    client: str
    step: int
    micro: int

    def mask(self, name: str, rows: int, width: int, rate: float, device: torch.device) -> Tensor:
        """Draw which inputs `[rows, width]` of the matrix `name` are kept, each with probability `1 - rate`: bool."""
        text = f"fl-llama dropout {self.seed} {self.client} {self.step} {self.micro} {name}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        if device.type != "cpu":
            generator = torch.Generator(device).manual_seed(seed >> 1)
            return torch.rand(rows, width, generator=generator, device=device) >= rate
        # A bit generator's own stream is fixed by NumPy for good, and is five times as fast as PyTorch's.
        size = rows * width
        raw = np.random.SFC64(seed).random_raw(-(-size // 2)).view(np.uint32)[:size]
        return torch.from_numpy(raw >= np.uint32(min(round(rate * 2**32), 2**32 - 1))).view(rows, width)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One client's rows in a pass: the lengths of its sequences, and its LoRA weights by name.

    `weights` are float32 leaves that require a gradient, all of the blocks that the pass runs; an empty mapping leaves
    the base as it is for these rows. Without `dropout` nothing is dropped, whatever the adapter's rate.
    """

    lengths: tuple[int, ...]
    weights: Mapping[str, Tensor]
    dropout: DropoutKey | None = None

    @property
    def rows(self) -> int:
        """How many rows the group has."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapted matrix inside a fused one: its name, and the columns of its output."""

    name: str
    columns: slice


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A group with weights, and where its rows lie."""

    rows: slice
    group: Group


@dataclass(frozen=True, slots=True, eq=False)
class _Update:
    """What is added to one fused matrix's product in one pass: a `LowRank`."""

    parts: tuple[_Part, ...]
    rows: tuple[_Rows, ...]
    scaling: float
    rate: float

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        leaves = [
            entry.group.weights[f"{part.name}.{half}.weight"]
            for entry in self.rows
            for part in self.parts
            for half in ("lora_A", "lora_B")
        ]
        added: Tensor = _LowRankUpdate.apply(x, out, self, *leaves)  # type: ignore[no-untyped-call]
        return added

    def sources(self, group: Group) -> list[tuple[_Part, ...]]:
        """Say which parts multiply the same input: all of them, or each its own where something is dropped."""
        return [(part,) for part in self.parts] if self.drops(group) else [self.parts]

    def drops(self, group: Group) -> bool:
        """Say whether the group's input is dropped in places."""
        return group.dropout is not None and self.rate > 0

    def mask(self, source: tuple[_Part, ...], group: Group, x: Tensor) -> Tensor | None:
        """Draw the mask of a source for the group's input `x`, `None` where nothing is dropped."""
        if group.dropout is None or not self.rate:
            return None
        return group.dropout.mask(source[0].name, len(x), x.shape[1], self.rate, x.device)


class _LowRankUpdate(torch.autograd.Function):
    """Add `scaling * B (A dropout(x))` in place: one node for all groups and parts of a fused matrix.

    It keeps the input, which the norm before it made, and the rank-sized products; nothing as wide as the output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, update: _Update, *leaves: Tensor) -> Tensor:
        saved: list[Tensor] = []
        pairs = _pairs(leaves)
        for entry in update.rows:
            x_g = x[entry.rows]
            for source in update.sources(entry.group):
                weights = [next(pairs) for _ in source]
                mask = update.mask(source, entry.group, x_g)
                z = _dropped(x_g.to(weights[0][0].dtype), mask, update.rate) @ _stacked(weights).t()
                for part, (_, b), z_part in zip(source, weights, z.chunk(len(source), dim=1), strict=True):
                    _add_product(out[entry.rows, part.columns], z_part, b.t(), update.scaling)
                saved += [z] if mask is None else [z, mask]
        ctx.mark_dirty(out)
        ctx.update = update
        ctx.save_for_backward(x, *leaves, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        update: _Update = ctx.update
        (grad,) = grads
        x, *kept = ctx.saved_tensors
        leaves = 2 * len(update.rows) * len(update.parts)
        pairs, saved = _pairs(kept[:leaves]), iter(kept[leaves:])
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_leaves: list[Tensor] = []
        for entry in update.rows:
            for source in update.sources(entry.group):
                weights = [next(pairs) for _ in source]
                z, mask = next(saved), next(saved) if update.drops(entry.group) else None
                a, x_g = _stacked(weights), x[entry.rows]
                grad_z = torch.empty_like(z)
                grad_b: list[Tensor] = []
                halves = zip(z.chunk(len(source), dim=1), grad_z.chunk(len(source), dim=1), strict=True)
                for part, (_, b), (z_part, grad_z_part) in zip(source, weights, halves, strict=True):
                    grad_part = grad[entry.rows, part.columns].to(b.dtype)
                    grad_z_part.copy_(grad_part @ b).mul_(update.scaling)
                    grad_b.append((grad_part.t() @ z_part).mul_(update.scaling))
                grad_a = grad_z.t() @ _dropped(x_g.to(a.dtype), mask, update.rate)
                for grad_pair in zip(grad_a.chunk(len(source)), grad_b, strict=True):
                    grad_leaves += grad_pair
                if grad_x is not None and mask is None:
                    _add_product(grad_x[entry.rows], grad_z, a, 1.0)
                elif grad_x is not None:
                    grad_x[entry.rows] += _dropped(grad_z @ a, mask, update.rate)
        return grad_x, grad, None, *grad_leaves


def _pairs(leaves: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(leaves[::2], leaves[1::2], strict=True)


def _stacked(weights: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Give the `lora_A` of parts that multiply the same input as one matrix: one product instead of several."""
    return weights[0][0] if len(weights) == 1 else torch.cat([a for a, _ in weights])


def _dropped(x: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    return x if mask is None else (x * mask).mul_(1 / (1 - rate))


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add `scale * left @ right` to a view; in a narrower type it is rounded once, after the sum."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.copy_(out.to(left.dtype).addmm_(left, right, alpha=scale))


class AdaptedBlock:
    """One block's fused matrices, and which of their parts are adapted."""

    def __init__(self, index: int, block: Block, lora: LoraConfig | None) -> None:
        self._lora = lora
        targets = () if lora is None else lora.target_modules
        self._matrices: list[tuple[FusedLinear, tuple[_Part, ...]]] = []
        for name, module in block.named_modules():
            if isinstance(module, FusedLinear):
                parent = f"model.layers.{index}.{name.rpartition('.')[0]}"
                self._matrices.append((module, tuple(_parts(module, parent, targets))))

    @contextmanager
    def attached(self, groups: Sequence[Group]) -> Iterator[None]:
        """Put the groups' updates on the matrices while the block runs; then all is as it was, whatever happened.

        Between two blocks of a pass the same modules may serve inference, whose own updates stay off meanwhile.
        """
        rows = _placed(groups)
        before = [(matrix, matrix.low_rank) for matrix, _ in self._matrices]
        try:
            for matrix, parts in self._matrices:
                matrix.low_rank = self._update(parts, rows)
            yield
        finally:
            for matrix, low_rank in before:
                matrix.low_rank = low_rank

    def _update(self, parts: tuple[_Part, ...], rows: tuple[_Rows, ...]) -> _Update | None:
        if self._lora is None or not parts or not rows:
            return None
        return _Update(parts, rows, self._lora.scaling, self._lora.dropout)


def _parts(matrix: FusedLinear, parent: str, targets: Sequence[str]) -> Iterator[_Part]:
    start = 0
    for part, outputs in matrix.parts.items():
        if part in targets:
            yield _Part(f"{parent}.{part}", slice(start, start + outputs))
        start += outputs


def _placed(groups: Sequence[Group]) -> tuple[_Rows, ...]:
    """Say where the rows of each group that adapts anything lie."""
    placed, start = [], 0
    for group in groups:
        if group.weights and group.rows:
            placed.append(_Rows(slice(start, start + group.rows), group))
        start += group.rows
    return tuple(placed)
