"""Transformers with PEFT, the oracle of everything about adapters: random adapters, texts and logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Bear the deprecation warnings that importing and calling PEFT gives, which pytest makes errors of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def base_model(folder: Path) -> Any:
    """Transformers' model of a checkpoint folder, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_peft(folder: Path, *, seed: int = 0, r: int = 4, alpha: int = 8, **more: Any) -> Any:
    """A PEFT model around the checkpoint's with an adapter of random weights, `lora_B` too, so that it matters."""
    with peft_quiet():
        from peft import LoraConfig, get_peft_model

        fixed: dict[str, Any] = {"target_modules": list(ATTENTION), "task_type": "CAUSAL_LM"}
        model = get_peft_model(base_model(folder), LoraConfig(r=r, lora_alpha=alpha, **(fixed | more)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def write_random_adapter(folder: Path, base: Path, **how: Any) -> Path:
    """Let PEFT write a random adapter for the checkpoint `base` into `folder`; give `folder`."""
    with peft_quiet():
        random_peft(base, **how).save_pretrained(folder)
    return folder


def load_peft(base: Path, adapter: Path) -> Any:
    """Transformers' model with the adapter of a PEFT folder, float32."""
    with peft_quiet():
        from peft import PeftModel

        return PeftModel.from_pretrained(base_model(base), str(adapter)).eval()


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """The logits `[n, V]` of one text."""
    found: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return found


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens of greedy text, not ended by any token."""
    fixed: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with peft_quiet():
        ids = torch.tensor([list(prompt)])
        # Without a mask, transformers takes every token 0 of the prompt for padding.
        fixed["attention_mask"] = torch.ones_like(ids)
        ids = model.generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, **fixed)
    return [int(token) for token in ids[0, len(prompt) :]]
