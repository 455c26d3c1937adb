"""Split training without a wire: A, B and C chained in one process, and the same in transformers with PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft_oracle import base_model, peft_quiet
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.load import load_segment
from split_llama.lora import LoraConfig, init_lora
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.compute.lora import DropoutKey, Group
from training.compute.tape import Trunk, finish

CPU = torch.device("cpu")


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


def random_weights(checkpoint: Checkpoint, lora: LoraConfig, seed: int = 0) -> dict[str, Tensor]:
    """First values for the whole model, and `lora_B` random too: with zeros nothing would reach `lora_A`."""
    blocks = BlockRange(0, checkpoint.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) * 0.1 if "lora_B" in name else weight
        for name, weight in init_lora(checkpoint.config, lora, blocks, seed).items()
    }


def leaves(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone().requires_grad_(True) for name, weight in weights.items()}


def random_batch(vocab: int, lengths: Sequence[int], seed: int = 0) -> Batch:
    """Random tokens; about half of them are targets, in every sequence the last one is."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, vocab, (length,), generator=generator).tolist() for length in lengths]
    learned = [torch.rand(length, generator=generator) < 0.5 for length in lengths]
    labels = [
        [
            token if wanted or place == len(row) - 1 else -100
            for place, (token, wanted) in enumerate(zip(row, some, strict=True))
        ]
        for row, some in zip(ids, (flags.tolist() for flags in learned), strict=True)
    ]
    return Batch.of(ids, labels)


@dataclass(frozen=True)
class Chain:
    """A, B and C of one model."""

    ends: Ends
    b: Trunk
    keep: bool = True

    @classmethod
    def load(
        cls,
        folder: Path,
        lora: LoraConfig,
        partition: str = "1,1",
        *,
        keep: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Chain:
        checkpoint, cut = open_checkpoint(folder), Partition.parse(partition)
        ends = Ends.load(checkpoint, cut, lora, ("A", "B", "C"), dtype=dtype, device=CPU, recompute=not keep)
        middle = cut.segment_b(checkpoint.config.num_hidden_layers)
        return cls(ends, Trunk(load_segment(checkpoint, middle, dtype=dtype, device=CPU), lora), keep)

    def run(self, batch: Batch, weights: Mapping[str, Tensor], dropout: DropoutKey | None = None) -> tuple[float, int]:
        """Forward and backward; gradients of the summed loss gather in the leaves."""
        h_a, tape_a = self.ends.forward_a(batch, weights, dropout)
        tape_b = finish(self.b.forward(h_a, [Group(batch.ragged.lengths, weights, dropout)], keep=self.keep))
        loss_sum, targets, grad = self.ends.loss(tape_b.output, batch, weights, dropout)
        self.ends.backward_a(tape_a, finish(tape_b.backward(grad)))
        return loss_sum, targets


def peft_twin(folder: Path, lora: LoraConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model with PEFT's LoRA of the same values, in training mode, without dropout."""
    with peft_quiet():
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        config = PeftConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            use_rslora=lora.use_rslora,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base_model(folder).to(dtype), config, autocast_adapter_dtype=dtype != torch.float64)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(weights[name])
    return model.train()


def trained(model: Any) -> dict[str, Tensor]:
    """The adapter's parameters of a PEFT model by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def padded(batch: Batch) -> dict[str, Tensor]:
    """The batch as transformers takes it: padded on the right."""

    def pad(flat: Tensor, value: int) -> Tensor:
        rows = torch.split(flat, list(batch.ragged.lengths))
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

    attention = pad(torch.ones_like(batch.token_ids), 0)
    return {"input_ids": pad(batch.token_ids, 0), "attention_mask": attention, "labels": pad(batch.labels, -100)}


def peft_run(model: Any, batch: Batch) -> float:
    """Forward and backward of the mean loss times its tokens; gives that sum."""
    with peft_quiet():
        loss = model(**padded(batch), use_cache=False).loss * batch.target_count
    loss.backward()
    return float(loss.detach())


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """How far all tensors together are from the expected ones, relative to their norm."""
    assert set(found) == set(expected)
    with torch.no_grad():
        errors = [float((found[name] - tensor).norm()) for name, tensor in expected.items()]
        return math.hypot(*errors) / math.hypot(*(float(tensor.norm()) for tensor in expected.values()))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    """Every tensor within `rtol`, relative to its norm, with thrice as much for one whose terms all but cancel."""
    assert distance(found, expected) <= rtol
    for name, tensor in expected.items():
        assert distance({name: found[name]}, {name: tensor}) <= 3 * rtol, name


def grads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of leaves; a missing one is an error."""
    found = {name: leaf.grad for name, leaf in weights.items()}
    assert all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}
