"""Weights and KV in fewer bits, over real processes and sockets: what comes out is what one process computes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from live_server import live_server

from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.demo import demo_model_path
from split_llama.engine.engine import Engine
from split_llama.engine.kv_cache import KV_DTYPES
from split_llama.load import load_embedding, load_packed_head, load_packed_segment, parse_dtype
from split_llama.products import Numerics

PROMPT = [1, 40, 41, 42, 43, 44, 45, 46]
TOKENS = 60


@torch.inference_mode()
def in_one_process(dtype: str, quantization: str, kv: str) -> list[int]:
    """Greedy text of the demo model with A, B and C in a row and nothing in between."""
    checkpoint = Checkpoint.open(demo_model_path())
    numerics = Numerics(parse_dtype(dtype), quantization, torch.device("cpu"))
    layers = checkpoint.config.num_hidden_layers
    cuts = (Partition(1, 1).segment_a, Partition(1, 1).segment_b, Partition(1, 1).segment_c)
    engines = [
        Engine(load_packed_segment(checkpoint, cut(layers), numerics), num_pages=16, kv_dtype=KV_DTYPES[kind])
        for cut, kind in zip(cuts, ("float32", kv, "float32"), strict=True)
    ]
    embedding = load_embedding(checkpoint, dtype=numerics.compute, device=numerics.device)
    head = load_packed_head(checkpoint, numerics)
    sequences = [engine.sequence(engine.blocks, 256) for engine in engines]
    text: list[int] = []
    new = PROMPT
    while len(text) < TOKENS:
        states = embedding(torch.tensor(new))
        for engine, sequence in zip(engines, sequences, strict=True):
            states = engine.run(engine.plan([sequence.append(len(new))]), states)
        new = [int(head(states[-1:]).argmax())]
        text += new
    return text


async def over_the_split(url: str, home: Path, dtype: str, quantization: str) -> list[int]:
    settings = EdgeSettings(
        server=url,
        model="demo",
        noise="0",
        speculate="off",  # equal text in few bits needs equal batches
        codec="fp32",
        dtype=dtype,
        quantization=quantization,
        threads=1,
        cache_dir=home / "cache",
        state_dir=home / "state",
    )
    async with EdgeRuntime.connect(settings) as edge, edge.open() as session:
        fixed = {"temperature": 0.0, "repetition_penalty": 1.0}
        turn = edge.turn(PROMPT, edge.params(max_new_tokens=TOKENS, ignore_eos=True, **fixed))
        async for _ in session.generate(PROMPT, turn):
            pass
        return turn.tokens


@pytest.mark.parametrize(
    ("dtype", "quantization", "kv"),
    [
        ("bfloat16", "none", "float32"),
        ("float16", "none", "bfloat16"),
        ("float32", "int8", "float32"),
        ("float32", "int8", "int8"),
        ("float32", "none", "fp8"),
    ],
)
def test_the_split_gives_what_one_process_gives(tmp_path: Path, dtype: str, quantization: str, kv: str) -> None:
    flags = ["--dtype", dtype, "--quantization", quantization, "--kv-cache-dtype", kv]
    with live_server("demo", *flags) as url:
        text = asyncio.run(over_the_split(url, tmp_path, dtype, quantization))
    want = in_one_process(dtype, quantization, kv)
    assert text == want
    assert len(set(want)) > 5, "text that repeats itself proves nothing"
