"""A tiny language whose next state follows from state and token, and a model folder for what needs one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edge_client.speculation.draft_head import DraftHead, HeadShape
from edge_client.speculation.head_file import TrainedHead, ends_digest
from edge_client.speculation.train_head import Ends
from split_llama.checkpoint import Checkpoint
from tests.tiny_models import TinyModel, write_model

WIDTH, VOCABULARY = 16, 40
SHAPE = HeadShape(WIDTH, 32, 8)


@dataclass(frozen=True)
class Language:
    """Tokens cycle by `token -> (3 token + 1) mod 40`, now and then by chance; states say which one comes next."""

    ends: Ends

    def sequences(self, count: int, length: int, seed: int) -> list[tuple[list[int], Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        return [self._sequence(length, draw) for _ in range(count)]

    def _sequence(self, length: int, draw: torch.Generator) -> tuple[list[int], Tensor]:
        tokens = [int(torch.randint(VOCABULARY, (1,), generator=draw))]
        for _ in range(length - 1):
            jump = float(torch.rand(1, generator=draw)) < 0.1
            tokens.append(int(torch.randint(VOCABULARY, (1,), generator=draw)) if jump else following(tokens[-1]))
        # The state at a position is the head's row of the token that should come next.
        return tokens, torch.stack([self.state(token) for token in tokens])

    def state(self, token: int) -> Tensor:
        return 3 * self.ends.lm_head[following(token)]


def following(token: int) -> int:
    return (3 * token + 1) % VOCABULARY


@pytest.fixture(scope="session")
def language() -> Language:
    draw = torch.Generator().manual_seed(5)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=draw)
    lm_head = torch.nn.functional.normalize(torch.randn(VOCABULARY, WIDTH, generator=draw)) * 3
    return Language(Ends(embedding, lm_head))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_model(tmp_path / "model", TinyModel(hidden=16, heads=2, kv_heads=2, intermediate=24)))


@pytest.fixture
def other_checkpoint(tmp_path: Path) -> Checkpoint:
    model = TinyModel(hidden=16, heads=2, kv_heads=2, intermediate=24, seed=1)
    return Checkpoint.open(write_model(tmp_path / "other", model))


def fresh(checkpoint: Checkpoint) -> TrainedHead:
    """A head that learnt nothing yet, for the model of `checkpoint`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DraftHead(SHAPE)
    return TrainedHead(head, torch.tensor([5, 9, 300]), ends_digest(checkpoint), {"positions": 12})
