"""The edge's share of an 8B model on a CPU: time per token and memory, beside the bytes it must read.

    python -m benchmarks.edge_share [--threads 1 --tokens 24 --weights int8,bfloat16,float32]

Geometry of Llama 3 8B (hidden 4,096, vocabulary 128,256), p = q = 1, random weights. Each type of weights runs in a
process of its own, which loads the share, feeds a prompt and then decodes: embedding, A, noise, codec; codec, C, head,
argmax. There is no server: the states that C gets are those that A gave. The memory limit is the time that one
thread takes to read as many bytes straight through, measured in the same process between the tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.common import record, spread
from edge_client.draft import Decision
from edge_client.edge_model import EdgeModel, Placement
from edge_client.work import Encoded, Work
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.load import parse_dtype, set_up_cpu
from split_llama.noise import NoiseScope, NoiseSpec, PrefixNoise
from split_llama.products import Numerics
from split_llama.wire.codec import Codec

PARTITION = Partition(1, 1)
# Three blocks stand for the 32: the edge neither holds nor reads what lies between its own.
MODEL_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = 32
KV_POSITIONS = 2048


def write_share(folder: Path) -> Path:
    """Write a bfloat16 checkpoint with random weights of the edge's blocks, the embedding and the head."""
    width, inner, vocab = MODEL_8B["hidden_size"], MODEL_8B["intermediate_size"], MODEL_8B["vocab_size"]
    narrow = width // MODEL_8B["num_attention_heads"] * MODEL_8B["num_key_value_heads"]
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width)}
    for block in (0, MODEL_8B["num_hidden_layers"] - 1):
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (narrow, width),
            "self_attn.v_proj": (narrow, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"model.layers.{block}.{name}"] = shape
    shapes["model.norm"] = (width,)
    tensors = {f"{name}.weight": _random(shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(MODEL_8B)))
    return folder


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # One block of normal numbers, repeated: a product's speed does not depend on what the numbers are.
    block = (torch.randn(2**22) / shape[1] ** 0.5).bfloat16()
    count = shape[0] * shape[1]
    return block.repeat(-(-count // len(block)))[:count].view(shape).contiguous()


def read_seconds(buffer: torch.Tensor) -> float:
    """Time one reading of all of a float32 buffer."""
    begin = time.perf_counter()
    buffer.sum()
    return time.perf_counter() - begin


class Share:
    """The edge's modules, fed by themselves instead of a server."""

    def __init__(self, folder: Path, weights: str) -> None:
        quantization = "int8" if weights == "int8" else "none"
        dtype = parse_dtype("float32" if weights == "int8" else weights)
        numerics = Numerics(dtype, quantization, torch.device("cpu"))
        checkpoint = Checkpoint.open(folder)
        self.model = EdgeModel(checkpoint, PARTITION, Codec.FP16, Placement(numerics, KV_POSITIONS))
        spec = NoiseSpec.parse("0.02")
        scope = NoiseScope("benchmark", "", BlockRange(1, 2), self.model.width, spec, numerics.label)
        self.model.use_noise(spec, PrefixNoise(b"s" * 32, scope))
        self.session = self.model.open(KV_POSITIONS)

    def feed(self, *tokens: int) -> tuple[Encoded, ...]:
        """Tokens through embedding and A; the rows that would be sent."""
        return self._run(Work(self.session, tokens=tokens))

    def decode(self, sent: tuple[Encoded, ...]) -> tuple[Encoded, ...]:
        """Rows that came back through C and head; the chosen token through embedding and A."""
        replies = tuple(piece.rows for piece in sent)
        return self._run(Work(self.session, replies, lambda logits, _states: Decision((0,), int(logits[0].argmax()))))

    def _run(self, work: Work) -> tuple[Encoded, ...]:
        (result,) = self.model.run([work])
        if isinstance(result, Exception):
            raise result
        return result.rows


def measure(folder: Path, weights: str, threads: int, tokens: int) -> dict[str, Any]:
    """Load one share and decode; seconds and bytes. Memory is what is this process's alone: mapped files are not."""
    set_up_cpu(threads)
    process = psutil.Process()
    before = process.memory_full_info().uss
    begin = time.perf_counter()
    share = Share(folder, weights)
    loading = time.perf_counter() - begin
    sent = share.feed(1, *range(100, 99 + PROMPT))
    held = process.memory_full_info().uss - before
    read = share.model.product_bytes
    straight_through = torch.ones(read // 4)
    token_ms, limit_ms = [], []
    for _ in range(tokens):
        begin = time.perf_counter()
        sent = share.decode(sent)
        token_ms.append(1000 * (time.perf_counter() - begin))
        limit_ms.append(1000 * read_seconds(straight_through))
    return {
        "weights": weights,
        "threads": threads,
        "load_seconds": loading,
        "held_bytes": held,
        "read_bytes_per_token": read,
        "token_ms": spread(token_ms),
        "memory_limit_ms": spread(limit_ms),
    }


def main() -> None:
    """Run each type of weights in a process of its own, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--weights", default="int8,bfloat16,float32", metavar="NAME,...")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, options.weights, options.threads, options.tokens)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_share(Path(temporary) / "model")
        for weights in options.weights.split(","):
            rows.append(_in_process(folder, weights, options))
            print(rows[-1], flush=True)
    record("edge_share", {"rows": rows})


def _in_process(folder: Path, weights: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.edge_share", "--folder", str(folder), "--weights", weights]
    command += ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


if __name__ == "__main__":
    main()
