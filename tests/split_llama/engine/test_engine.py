"""The engine against transformers, and against itself: partitions, mixed batches, drafts, forks and rollbacks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from tiny_models import FAMILIES
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.demo import demo_model_path
from split_llama.engine.engine import Engine
from split_llama.engine.sequence import Sequence
from split_llama.errors import PartitionNotAllowed
from split_llama.load import load_embedding, load_head, load_segment

CPU = torch.device("cpu")
FP32: dict[str, Any] = {"dtype": torch.float32, "device": CPU}


def engine_for(checkpoint: Checkpoint, blocks: BlockRange, num_pages: int = 256) -> Engine:
    return Engine(load_segment(checkpoint, blocks, **FP32), num_pages=num_pages)


def whole(checkpoint: Checkpoint) -> BlockRange:
    return BlockRange(0, checkpoint.config.num_hidden_layers)


def step(engine: Engine, sequence: Sequence, rows: Tensor) -> Tensor:
    run = sequence.append(len(rows))
    return engine.run(engine.plan([run]), rows)


class SplitModel:
    """A, B and C as three engines in one process, one sequence."""

    def __init__(self, folder: Path, partition: Partition) -> None:
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.config
        layers = config.num_hidden_layers
        ranges = (partition.segment_a(layers), partition.segment_b(layers), partition.segment_c(layers))
        self.embedding = load_embedding(checkpoint, **FP32)
        self.head = load_head(checkpoint, **FP32)
        self.engines = [engine_for(checkpoint, blocks) for blocks in ranges]
        self.sequences = [e.sequence(e.blocks, config.max_position_embeddings) for e in self.engines]

    def logits(self, tokens: list[int]) -> Tensor:
        """Logits `[n, V]` of the new tokens."""
        states = self.embedding(torch.tensor(tokens))
        for engine, sequence in zip(self.engines, self.sequences, strict=True):
            states = step(engine, sequence, states)
        out: Tensor = self.head(states)
        return out

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens, new = [], prompt
        for _ in range(count):
            new = [int(self.logits(new)[-1].argmax())]
            tokens += new
        return tokens


def reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Transformers' own greedy text; end-of-sequence tokens do not end it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in ids[0, len(prompt) :]]


def prompt_for(folder: Path, length: int = 12) -> list[int]:
    vocab = Checkpoint.open(folder).config.vocab_size
    rng = random.Random(length)
    return [1] + [rng.randrange(3, vocab) for _ in range(length - 1)]


def all_partitions(layers: int) -> list[Partition]:
    return [Partition(p, q) for p in range(layers) for q in range(layers - p)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_partition_of_every_family_generates_what_transformers_does(
    tiny_checkpoint: TinyCheckpoint, family: str
) -> None:
    folder = tiny_checkpoint(family=family)
    prompt = prompt_for(folder)
    want = reference(folder, prompt, 200)
    assert len(set(want)) > 20, "text that repeats one token proves nothing"
    for partition in all_partitions(4):
        assert SplitModel(folder, partition).greedy(prompt, 200) == want, str(partition)


@pytest.mark.parametrize(
    "geometry",
    [
        {"tie": True},
        {"head_dim": 16},
        {"kv_heads": 4},
        {"kv_heads": 1, "shards": 3},
        {"family": "llama", "overrides": {"attention_bias": True, "mlp_bias": True}},
        {"overrides": {"rope_scaling": {"type": "linear", "factor": 4.0}}},
        {"family": "qwen3", "overrides": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}},
    ],
    ids=str,
)
def test_geometries_generate_what_transformers_does(tiny_checkpoint: TinyCheckpoint, geometry: dict[str, Any]) -> None:
    folder = tiny_checkpoint(**geometry)
    prompt = prompt_for(folder)
    assert SplitModel(folder, Partition(1, 1)).greedy(prompt, 100) == reference(folder, prompt, 100)


def test_a_trained_model_generates_what_transformers_does_in_every_partition(data_dir: Path) -> None:
    folder = data_dir / "stories260K"
    prompt = prompt_for(folder)
    want = reference(folder, prompt, 200)
    for partition in all_partitions(5):
        assert SplitModel(folder, partition).greedy(prompt, 200) == want, str(partition)


@pytest.mark.slow  # the same goes through real sockets in tests/e2e/test_parity.py
def test_the_demo_model_generates_what_transformers_does_in_every_partition() -> None:
    folder = demo_model_path()
    prompt = prompt_for(folder)
    want = reference(folder, prompt, 200)
    layers = Checkpoint.open(folder).config.num_hidden_layers
    for partition in all_partitions(layers):
        assert SplitModel(folder, partition).greedy(prompt, 200) == want, str(partition)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_sequence_does_not_notice_who_shares_its_batch(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family=family, layers=5))
    engine = engine_for(checkpoint, BlockRange(1, 4))
    rng = random.Random(3)
    torch.manual_seed(3)
    ranges = [BlockRange(a, b) for a in (1, 2, 3) for b in range(a + 1, 5)]
    sequences = [engine.sequence(rng.choice(ranges), 200) for _ in range(32)]
    alone = [engine_for(checkpoint, BlockRange(1, 4)) for _ in sequences]
    twins = [e.sequence(s.blocks, 200) for e, s in zip(alone, sequences, strict=True)]
    for _ in range(6):
        taking_part = [i for i in range(32) if rng.random() < 0.7]
        rows = {i: torch.randn(rng.choice([1, 1, 5, 17]), 32) for i in taking_part}
        plan = engine.plan([sequences[i].append(len(rows[i])) for i in taking_part])
        together = engine.run(plan, torch.cat([rows[i] for i in taking_part]))
        for i, span in zip(taking_part, plan.row_ranges(), strict=True):
            by_itself = step(alone[i], twins[i], rows[i])
            torch.testing.assert_close(together[span.start : span.stop], by_itself, rtol=1e-4, atol=1e-4)


def test_an_accepted_draft_is_what_plain_steps_would_have_left(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint())
    engine = engine_for(checkpoint, whole(checkpoint))
    torch.manual_seed(1)
    prefix, nodes, after = torch.randn(18, 32), torch.randn(5, 32), torch.randn(3, 32)
    tree = (0b1, 0b11, 0b101, 0b1101, 0b10001)
    drafted, plain = (engine.sequence(whole(checkpoint), 100) for _ in range(2))
    step(engine, drafted, prefix)
    step(engine, plain, prefix)
    verified = engine.run(engine.plan([drafted.append_draft(tree)]), nodes)
    path = [0, 2, 3]
    torch.testing.assert_close(verified[path], step(engine, plain, nodes[path]), rtol=1e-4, atol=1e-4)
    drafted.accept(tuple(path))
    torch.testing.assert_close(step(engine, drafted, after), step(engine, plain, after), rtol=1e-4, atol=1e-4)


def test_forks_and_rollbacks_leave_the_others_alone(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint())
    engine = engine_for(checkpoint, whole(checkpoint))
    torch.manual_seed(2)
    rows, left, right = torch.randn(21, 32), torch.randn(9, 32), torch.randn(9, 32)
    parent = engine.sequence(whole(checkpoint), 100)
    step(engine, parent, rows)
    child = parent.fork(19)
    fresh = engine.sequence(whole(checkpoint), 100)
    step(engine, fresh, rows[:19])
    torch.testing.assert_close(step(engine, child, left), step(engine, fresh, left), rtol=1e-4, atol=1e-4)
    whole_again = engine.sequence(whole(checkpoint), 100)
    step(engine, whole_again, rows)
    torch.testing.assert_close(step(engine, parent, right), step(engine, whole_again, right), rtol=1e-4, atol=1e-4)
    parent.truncate(19)
    child.truncate(19)
    torch.testing.assert_close(step(engine, parent, right), step(engine, child, right), rtol=1e-4, atol=1e-4)
    for sequence in (parent, child, fresh, whole_again):
        sequence.free()
    assert engine.pool.num_used == 0


def test_blocks_that_are_not_hosted_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = engine_for(Checkpoint.open(tiny_checkpoint()), BlockRange(1, 3))
    with pytest.raises(PartitionNotAllowed, match=r"\[0, 3\).*\[1, 3\)"):
        engine.sequence(BlockRange(0, 3), 10)
