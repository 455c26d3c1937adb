"""Which passes a server runs: over the Triton kernels or in plain PyTorch; decided before the weights are read."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from serving.kernels_package import check_kernels_package
from serving.passes import HostPasses, Passes
from split_llama.config import ModelConfig
from split_llama.engine.engine import Engine
from split_llama.errors import UnsupportedModel, UsageError

LEAST_CAPABILITY = (8, 0)
WARM_UP_SECONDS = 30.0

log = logging.getLogger("fl_llama.device")


def choose_attention(wanted: str, config: ModelConfig, device: torch.device, page_size: int) -> str:
    """Turn `--attention` into "triton" or "torch".

    `auto` takes the kernels on a CUDA device that can run them, for a model that they serve. Raises `UsageError` where
    `triton` cannot run here or another package of the name `kernels` is in the way, and `UnsupportedModel`, naming the
    limit, where the kernels do not serve the model.
    """
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return "torch"
    missing = _missing(device)
    if missing is None:
        check_kernels_package()
        limit = _limit(config, page_size)
        if limit is None:
            return "triton"
        if wanted == "triton":
            raise UnsupportedModel(f"--attention triton: {limit}; choose --attention torch")
        missing = limit
    elif wanted == "triton":
        raise UsageError(f"--attention triton: {missing}; choose --attention torch")
    log.warning("attention=torch, which is slower: %s", missing)
    return "torch"


def _missing(device: torch.device) -> str | None:
    """Say what this machine lacks for the kernels."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA builds for Linux; pip install triton)"
    if device.type != "cuda":
        # The interpreter, hundreds of times slower, is how tests run the kernels.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"the kernels need a CUDA device, the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, this device has {'.'.join(map(str, capability))}"
    return None


def _limit(config: ModelConfig, page_size: int) -> str | None:
    """Name the limit of the kernels that a model breaks."""
    from kernels.limits import unsupported

    group = config.num_attention_heads // config.num_key_value_heads
    return unsupported(head_dim=config.head_dim, page_size=page_size, group=group)


def make_passes(engine: Engine, attention: str, *, max_rows: int, max_sequences: int) -> Passes:
    """Make the passes that `choose_attention` decided on, ready to serve: kernels compiled, graphs captured."""
    if attention == "torch":
        return HostPasses(engine)
    from serving.device.graphs import Most
    from serving.device.passes import DevicePasses
    from serving.device.runner import Runner

    most = Most(max_rows, max_sequences)
    passes = DevicePasses(Runner(engine.segment, engine.cache, most, adapters=engine.adapters))
    passes.warm_up(WARM_UP_SECONDS)
    return passes
