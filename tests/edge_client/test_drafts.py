"""Drafts change how often the edge waits for the server, and nothing else: not one token, not one row that is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.generate import GenerationStats
from edge_client.runtime import EdgeRuntime
from edge_client.speculation.drafter import DraftRequest, Guesses
from tests.conftest import TinyCheckpoint
from tests.edge_client.conftest import MakeSettings, ServeModel

PROMPT = [1, 20, 30, 40, 50]


class Prophet:
    """Knows the answer, and hides it among wrong guesses: a tree with the truth on some of its branches."""

    def __init__(self, truth: Sequence[int], vocab: int, wrong: float, width: int) -> None:
        self._truth = list(truth)
        self._vocab = vocab
        self._wrong = wrong
        self._width = width
        self._draw = random.Random(5)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Guesses:
        rest = self._truth[len(request.tokens) :]
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for right in rest:
            siblings = {self._draw.randrange(self._vocab) for _ in range(self._width)} - {right}
            if self._draw.random() >= self._wrong:
                siblings = {*list(siblings)[1:], right}
            for token in sorted(siblings, key=lambda _: self._draw.random()):
                if len(tokens) < request.max_guesses:
                    tokens.append(token)
                    parents.append(parent)
            if right not in siblings or len(tokens) >= request.max_guesses:
                break
            parent = max(i for i in range(len(tokens)) if tokens[i] == right)
        return Guesses(tuple(tokens), tuple(parents), tuple(0.5 ** (depth + 1) for depth in _depths(parents)))


def _depths(parents: Sequence[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


async def answer(
    edge: EdgeRuntime, count: int, prompt: Sequence[int] = PROMPT, **sampling: object
) -> tuple[list[int], GenerationStats]:
    turn = edge.turn(prompt, edge.params(max_new_tokens=count, ignore_eos=True, **sampling))
    async with edge.open() as session:
        events = [event async for event in session.generate(prompt, turn)]
    assert [event.token for event in events] == turn.tokens
    assert len(session.stats.itl_ms) == len(turn.tokens) - 1
    return turn.tokens, session.stats


@pytest.mark.parametrize("partition", ["1,1", "2,0", "0,2"])
@pytest.mark.parametrize(("guesses", "width"), [("3", 1), ("12", 3), ("63", 4)])
@pytest.mark.parametrize("noise", ["0", "0.05"])
async def test_text_and_noise_are_those_without_drafts(
    tiny_checkpoint: TinyCheckpoint,
    serve_model: ServeModel,
    edge_settings: MakeSettings,
    partition: str,
    guesses: str,
    width: int,
    noise: str,
) -> None:
    folder = tiny_checkpoint()
    async with serve_model(folder) as url:
        plain = edge_settings(
            url, partition=partition, noise=noise, speculate="off", model=str(folder), allow_embedding_states=True
        )
        async with EdgeRuntime.connect(plain) as edge:
            greedy, _ = await answer(edge, 60)
            sampled, _ = await answer(edge, 60, temperature=1.5, seed=3, top_k=50)
        async with EdgeRuntime.connect(replace(plain, speculate=guesses)) as edge:
            edge.model.drafter = Prophet(PROMPT + greedy, 320, wrong=0.2, width=width)
            drafted, stats = await answer(edge, 60)
            assert drafted == greedy
            assert stats.round_trips < 50
            assert stats.accepted > 0
            assert stats.drafted > stats.accepted
            edge.model.drafter = Prophet(PROMPT + sampled, 320, wrong=0.2, width=width)
            drafted, stats = await answer(edge, 60, temperature=1.5, seed=3, top_k=50)
            assert drafted == sampled
            assert stats.round_trips < 50


async def test_a_fork_of_a_drafted_answer_goes_on_like_the_whole(
    tiny_checkpoint: TinyCheckpoint, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint()
    async with serve_model(folder) as url:
        settings = edge_settings(url, speculate="20")
        async with EdgeRuntime.connect(replace(settings, speculate="off")) as edge:
            whole, _ = await answer(edge, 80)
        async with EdgeRuntime.connect(settings, max_sessions=4) as edge:
            edge.model.drafter = Prophet(PROMPT + whole, 320, wrong=0.1, width=3)
            for count in (30, 31, 47):
                turn = edge.turn(PROMPT, edge.params(max_new_tokens=count, ignore_eos=True))
                async with edge.conversations.session(PROMPT) as session:
                    _ = [event async for event in session.generate(PROMPT, turn)]
                assert turn.tokens == whole[:count]
                longer = PROMPT + whole[:60]
                turn = edge.turn(longer, edge.params(max_new_tokens=20, ignore_eos=True))
                async with edge.conversations.session(longer) as session:
                    assert session.stats.cached_tokens >= len(PROMPT) + count - 2
                    _ = [event async for event in session.generate(longer, turn)]
                assert turn.tokens == whole[60:80]
                await edge.conversations.clear()


async def test_final_states_are_transformers_hidden_states(
    tiny_checkpoint: TinyCheckpoint, serve_model: ServeModel, edge_settings: MakeSettings, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint()
    ids = [1, *range(10, 200)]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole.model(torch.tensor([ids])).last_hidden_state[0]
    async with serve_model(folder) as url:
        for partition in ("1,1", "2,0"):
            async with EdgeRuntime.connect(edge_settings(url, partition=partition)) as edge:
                states = await edge.final_states(ids)
                torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
