"""Whether a job is of a size that a server can hold. Pure."""

from __future__ import annotations

import torch

from split_llama.errors import UsageError
from training.job_config import JobConfig
from training.server.adapters import AdapterPlan

# What clients have sent and wait with may take so many times the memory for what is under way.
WAITING_PARTS = 4


def least_bytes(config: JobConfig, plan: AdapterPlan, rows: int) -> int:
    """Estimate what a micro-batch of so many rows needs at least, from its forward to its backward."""
    dtype = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
    return rows * plan.model.hidden_size * (len(plan.blocks) * dtype.itemsize + 2 * torch.float32.itemsize)


def check_size(config: JobConfig, plan: AdapterPlan, limit: int) -> None:
    """Check that a job's largest micro-batches fit into `limit` bytes, and what may wait into its multiple.

    Raises `UsageError`.
    """
    longest = plan.model.max_position_embeddings
    if config.max_length > longest:
        raise UsageError(f"max_length {config.max_length}: the model has {longest} positions; use at most that")
    rows = config.batch_size * config.max_length
    advice = "or give the server more memory for fine-tuning (--extension-memory)"
    if (least := least_bytes(config, plan, rows)) > limit:
        raise UsageError(
            f"a micro-batch of batch_size x max_length = {rows} tokens holds {least} bytes here, of {limit} that may "
            f"be; use a smaller batch_size or max_length, {advice}"
        )
    waiting = config.clients * config.max_micros * rows * plan.model.hidden_size * torch.float32.itemsize
    if waiting > WAITING_PARTS * limit:
        raise UsageError(
            f"clients x max_micros micro-batches of {rows} tokens may wait here with {waiting} bytes, of "
            f"{WAITING_PARTS * limit} that may be; use a smaller max_micros, batch_size or max_length, {advice}"
        )
