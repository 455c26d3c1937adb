"""The head that comes with the demo model: small, found, and worth more than two tokens per round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.runtime import EdgeRuntime
from edge_client.speculation.combined import CombinedDrafter
from edge_client.speculation.find import BUNDLED, find_head, make_drafter
from split_llama.checkpoint import Checkpoint
from split_llama.demo import demo_model_path
from tests.edge_client.conftest import MakeSettings, ServeModel
from training.demo.evaluate import cases

COUNT = 6


def test_it_is_small_and_found(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(demo_model_path())
    path = find_head(checkpoint, tmp_path)
    assert path is not None
    assert path.parent == BUNDLED
    assert path.stat().st_size < 1_000_000
    assert isinstance(make_drafter("auto", checkpoint, tmp_path), CombinedDrafter)


@pytest.mark.parametrize("noise", ["0", "mean-abs=0.02"])
async def test_it_brings_more_than_two_tokens_per_round_trip(
    noise: str, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    """On held-out questions, greedily; and the text is that without guesses."""
    asked = [case.prompt for style in ("plain", "chat") for case in cases(21, COUNT, "story", style)]
    answers: dict[str, list[list[int]]] = {}
    tokens = trips = 0
    async with serve_model(demo_model_path()) as url:
        for speculate in ("off", "16"):
            answers[speculate] = []
            async with EdgeRuntime.connect(
                edge_settings(url, noise=noise, speculate=speculate, drafter="head")
            ) as edge:
                for prompt in asked:
                    ids = edge.tokenizer.encode(prompt)
                    turn = edge.turn(ids, edge.params(max_new_tokens=48))
                    async with edge.open() as session:
                        async for _ in session.generate(ids, turn):
                            pass
                    answers[speculate].append(turn.tokens)
                    if speculate != "off":
                        # The prompt's own round trip gives the first token.
                        tokens, trips = tokens + len(turn.tokens) - 1, trips + session.stats.round_trips - 1
    assert answers["16"] == answers["off"]
    assert tokens >= 2 * trips > 0
