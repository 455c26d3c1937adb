"""The whole road, real processes and sockets: the text equals transformers' `generate`, whoever else is served."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from live_server import live_server
from tiny_models import FAMILIES

from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.demo import demo_model_path

TOKENS = 200


def reference(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Transformers' greedy text of each prompt, not ended by any token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, **fixed)
        texts.append([int(token) for token in ids[0, len(prompt) :]])
    return texts


def random_prompts(folder: Path, count: int) -> list[list[int]]:
    rng = random.Random(count)
    vocab = Checkpoint.open(folder).config.vocab_size
    return [[1, *(rng.randrange(3, vocab) for _ in range(rng.randrange(1, 24)))] for _ in range(count)]


async def generate(edge: EdgeRuntime, prompt: list[int], count: int) -> list[int]:
    async with edge.open() as session:
        turn = edge.turn(
            prompt, edge.params(max_new_tokens=count, ignore_eos=True, temperature=0.0, repetition_penalty=1.0)
        )
        async for _ in session.generate(prompt, turn):
            pass
        return turn.tokens


def settings(url: str, folder: Path, home: Path, partition: Partition, **changed: object) -> EdgeSettings:
    fixed = {
        "server": url,
        "model": str(folder),
        "noise": "0",
        "codec": "fp32",
        "partition": str(partition),
        "threads": 1,
    }
    places = {"cache_dir": home / "cache", "state_dir": home / "state", "allow_embedding_states": True}
    return EdgeSettings(**{**fixed, **places, **changed})  # type: ignore[arg-type]


async def every_partition(url: str, folder: Path, home: Path, prompt: list[int]) -> dict[str, list[int]]:
    layers = Checkpoint.open(folder).config.num_hidden_layers
    texts = {}
    for partition in [Partition(p, q) for p in range(layers) for q in range(layers - p)]:
        async with EdgeRuntime.connect(settings(url, folder, home, partition)) as edge:
            texts[str(partition)] = await generate(edge, prompt, TOKENS)
    return texts


def check_every_partition(folder: Path, home: Path) -> None:
    prompt = random_prompts(folder, 1)[0]
    want = reference(folder, [prompt], TOKENS)[0]
    assert len(set(want)) > 9, "text that repeats itself proves nothing"
    with live_server(folder, "--allowed-partitions", "0,0") as url:
        texts = asyncio.run(every_partition(url, folder, home, prompt))
    assert [partition for partition, text in texts.items() if text != want] == []


def test_the_trained_model_in_every_partition(data_dir: Path, tmp_path: Path) -> None:
    check_every_partition(data_dir / "stories260K", tmp_path)


def test_the_demo_model_in_every_partition(tmp_path: Path) -> None:
    check_every_partition(demo_model_path(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_partition(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str) -> None:
    check_every_partition(tiny_checkpoint(family=family), tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_session_among_32_others(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(family=family, layers=5)
    prompts = random_prompts(folder, 33)
    want = reference(folder, prompts, 60)

    async def together(url: str) -> list[list[int]]:
        first = settings(url, folder, tmp_path, Partition(1, 1))
        second = settings(url, folder, tmp_path, Partition(2, 1))
        # Two edges with different partitions, so that different block ranges share the server's passes.
        async with (
            EdgeRuntime.connect(first, max_sessions=17) as one,
            EdgeRuntime.connect(second, max_sessions=16) as two,
        ):
            edges = [one if i % 2 == 0 else two for i in range(33)]
            return await asyncio.gather(*(generate(e, p, 60) for e, p in zip(edges, prompts, strict=True)))

    with live_server(folder) as url:
        assert asyncio.run(together(url)) == want


@pytest.mark.parametrize("transport", ["ws", "http"])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_the_transport_changes_nothing_and_noise_repeats(
    data_dir: Path, tmp_path: Path, transport: str, codec: str
) -> None:
    folder = data_dir / "stories260K"
    prompt = random_prompts(folder, 2)[1]

    async def twice(url: str) -> list[list[int]]:
        changed = {"transport": transport, "codec": codec, "noise": "mean-abs=0.05"}
        texts = []
        for _ in range(2):
            async with EdgeRuntime.connect(settings(url, folder, tmp_path, Partition(1, 1), **changed)) as edge:
                texts.append(await generate(edge, prompt, 24))
        return texts

    with live_server(folder) as url:
        first, second = asyncio.run(twice(url))
    assert first == second
