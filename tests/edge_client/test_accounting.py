"""What was released is counted once per distinct row, whatever was sent again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint

from edge_client.edge_model import EdgeModel, Placement
from edge_client.work import Work
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.noise import NoiseScope, NoiseSpec, PrefixNoise
from split_llama.products import Numerics
from split_llama.wire.codec import Codec


def model(folder: Path, partition: Partition, noise: str) -> EdgeModel:
    placed = Placement(Numerics(torch.float32, "none", torch.device("cpu")), 256)
    edge = EdgeModel(Checkpoint.open(folder), partition, Codec.FP16, placed)
    spec = NoiseSpec.parse(noise)
    blocks = BlockRange(partition.p, 4 - partition.q)
    scope = NoiseScope("digest", "", blocks, edge.width, spec, "float32")
    edge.use_noise(spec, PrefixNoise(b"s" * 32, scope))
    return edge


def feed(edge: EdgeModel, *tokens: int) -> None:
    session = edge.open(100)
    (result,) = edge.run([Work(session, tokens=tokens)])
    assert not isinstance(result, Exception)
    session.free()


@pytest.mark.parametrize(("noise", "counted"), [("0.02", (3, 3, 5)), ("0", (0, 0, 0))])
def test_distinct_rows_are_counted_and_the_public_first_row_is_not(
    tiny_checkpoint: TinyCheckpoint, noise: str, counted: tuple[int, int, int]
) -> None:
    edge = model(tiny_checkpoint(), Partition(1, 1), noise)
    seen = []
    for tokens in ((1, 7, 8, 9), (1, 7, 8), (1, 7, 5, 9)):
        feed(edge, *tokens)
        seen.append(edge.accountant.rows)
    assert tuple(seen) == counted
