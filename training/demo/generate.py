"""Greedy generation with plain transformers, many prompts at once, with optional noise after the first block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM


def noise_after_block(model: LlamaForCausalLM, block: int, sigma: Tensor | float) -> torch.utils.hooks.RemovableHandle:
    """Add Gaussian noise to the output of `block`, as the edge does before it sends; position 0 (BOS) stays exact.

    `sigma` is the standard deviation per coordinate, a number or a tensor that broadcasts to [rows, positions, hidden].
    A pass over a single position is taken for a decoding step, so its position is noised.
    """

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        noise = torch.randn_like(output) * sigma
        if output.shape[1] > 1:
            noise[:, 0] = 0.0
        return output + noise

    layer: nn.Module = model.model.layers[block]
    return layer.register_forward_hook(hook)


class Generator:
    """A model and its tokenizer, for greedy answers."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end_ids = torch.tensor(end_ids)

    @classmethod
    def load(cls, folder: Path, sigma: float = 0.0) -> Generator:
        """Load a model folder in fp32; `sigma` is the noise after the first block."""
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.train(False)
        if sigma:
            noise_after_block(model, 0, sigma)
        return cls(model, Tokenizer.from_file(str(folder / "tokenizer.json")), model.generation_config.eos_token_id)

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt up to an end token, without special tokens."""
        by_length: dict[int, list[int]] = defaultdict(list)
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        for index, ids in enumerate(encoded):
            by_length[len(ids)].append(index)
        answers = [""] * len(prompts)
        # Rows of one length need no padding, so every row sees exactly what it would see alone.
        for indices in by_length.values():
            rows = self._continue(torch.tensor([encoded[index] for index in indices]), max_new_tokens)
            for index, row in zip(indices, rows.tolist(), strict=True):
                answers[index] = self.tokenizer.decode(self._until_end(row))
        return answers

    @torch.inference_mode()
    def _continue(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        # A loop of our own: `generate` costs more than this small model does.
        output = self.model(input_ids=ids, use_cache=True)
        new: list[Tensor] = []
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            new.append(output.logits[:, -1].argmax(-1))
            ended |= torch.isin(new[-1], self.end_ids)
            if ended.all():
                break
            output = self.model(input_ids=new[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        return torch.stack(new, dim=1)

    def _until_end(self, row: Sequence[int]) -> list[int]:
        ends = set(self.end_ids.tolist())
        stop = next((position for position, token in enumerate(row) if token in ends), len(row))
        return list(row[:stop])
