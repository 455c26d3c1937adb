"""What every benchmark needs: a random model on disk, a server process, and a record of what was measured where."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

RESULTS = Path(__file__).parent / "results"

# The geometry of the comparison with other split systems: 134M parameters, 109.5M of them used per token.
MODEL_134M: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_random_model(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Write a float32 checkpoint with random weights (LLaMA names) and a tokenizer of made-up words."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    wide, narrow = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": normal(vocab, width), "lm_head.weight": normal(vocab, width)}
    tensors["model.norm.weight"] = torch.ones(width)
    shapes = {"q": (wide, width), "k": (narrow, width), "v": (narrow, width), "o": (width, wide)}
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": normal(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": normal(*shape) for name, shape in mlp.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w1", "eos_token": "w2"}))
    return folder


def free_port() -> int:
    """Find a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_server(model: Path | str, *flags: str, ready_seconds: float = 120.0) -> Iterator[str]:
    """Run `split-server MODEL` in a process of its own on a free loopback port; give its URL."""
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", str(model), "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, ready_seconds)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Poll /readyz; raise `RuntimeError` if the server ends or takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {seconds} s")


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def record(name: str, figures: Mapping[str, Any], command: Sequence[str] | None = None) -> Path:
    """Write `results/NAME.json`: figures, command, machine, date."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    module = f"benchmarks.{name.partition('-')[0]}"
    shown = " ".join(["python", "-m", module, *(sys.argv[1:] if command is None else command)])
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": shown, "date": now, "machine": machine()} | dict(figures), indent=1) + "\n")
    print(f"wrote {path.relative_to(Path(__file__).parents[1])}", file=sys.stderr)
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Give minimum, median and maximum."""
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}
