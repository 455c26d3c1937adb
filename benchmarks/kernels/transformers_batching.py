"""transformers' continuous batching over blocks of random weights: what the runner is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def transformers_batching(
    device: torch.device, geometry: dict[str, Any], requests: int, prompt: int, new: int, ours: float | None
) -> dict[str, Any]:
    """Decode tokens per second of `generate_batch` with its own defaults, while all requests decode.

    `geometry` is a LLaMA's config.json; `ours` the rate of the runner on the same geometry, if it is known.
    """
    import transformers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    fields = {name: value for name, value in geometry.items() if name != "model_type"}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16).eval()
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, geometry["vocab_size"], prompt).tolist() for _ in range(requests)]
    # No token ends a text.
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    began = time.perf_counter()
    outputs = model.generate_batch(
        inputs=prompts, generation_config=config, record_timestamps=True, progress_bar=False, warmup=True
    )
    wall = time.perf_counter() - began
    stamps = [output.timestamps for output in outputs.values()]
    rate = steady_rate(stamps)
    return {
        "version": transformers.__version__,
        "attention": model.config._attn_implementation,
        "requests": len(stamps),
        "decode_tokens_per_second": rate,
        "wall_seconds_with_its_start": wall,
        "runner_times_faster": None if ours is None or rate is None else ours / rate,
    }


def steady_rate(stamps: Sequence[Sequence[float]]) -> float | None:
    """Tokens per second between the last request's first token and the first request's last one."""
    begin, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    tokens = sum(begin < at <= end for times in stamps for at in times)
    return tokens / (end - begin) if end > begin and tokens else None
