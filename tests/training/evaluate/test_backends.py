"""The whole model and the split one answer alike in float32, also with an adapter, padded, forked and cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import live_server
from peft_oracle import base_model, greedy, load_peft, logits, write_random_adapter
from tiny_models import TinyModel, write_model

from edge_client.settings import EdgeSettings
from training.attacks.measure import run_attack
from training.attacks.public import PublicModel
from training.attacks.vocabulary import VocabularyMatching
from training.evaluate.central import CentralModel
from training.evaluate.split import SplitModel
from training.tasks.examples import IGNORED, Sample

PROMPTS = [[1, *[(7 * i + 3 * j) % 300 + 4 for j in range(5 * i + 2)]] for i in range(7)]


@dataclass(frozen=True)
class World:
    folder: Path
    adapter: Path
    url: str
    scratch: Path

    def settings(self, **more: Any) -> EdgeSettings:
        fixed = {"server": self.url, "model": str(self.folder), "noise": "0", "codec": "fp32", "speculate": "off"}
        places = {"state_dir": self.scratch / "state", "cache_dir": self.scratch / "cache", "threads": 1}
        return EdgeSettings(**(fixed | places | more))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    scratch = tmp_path_factory.mktemp("evaluate")
    folder = write_model(scratch / "model", TinyModel(family="mistral", sliding_window=16))
    adapter = write_random_adapter(scratch / "adapter", folder)
    with live_server(folder, "--lora-modules", f"mine={adapter}") as url:
        yield World(folder, adapter, url, scratch)


def alternatives() -> list[list[Sample]]:
    """Groups of one, of many, of none in common, and a passage."""
    groups = []
    for at, prompt in enumerate(PROMPTS):
        answers = [[30 + at, 2], [31, 8, 2], [30 + at], [31, 9, 10, 2], [77]][: at + 1]
        groups.append([Sample((*prompt, *end), (*[IGNORED] * len(prompt), *end)) for end in answers])
    groups.append([Sample((5, 6, 7), (5, 6, 7)), Sample((8, 6), (8, 6))])
    passage = tuple(PROMPTS[-1])
    groups.append([Sample(passage, (IGNORED, *passage[1:]))])
    return groups


def naive(model: Any, sample: Sample) -> float:
    logprobs = torch.log_softmax(logits(model, sample.token_ids).double(), dim=-1)
    return sum(float(logprobs[at - 1, label]) for at, label in enumerate(sample.labels) if at and label != IGNORED)


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(each) for each in found] == [len(each) for each in expected]
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
async def test_the_whole_model_is_transformers_one_by_one(world: World, adapted: bool) -> None:
    oracle = load_peft(world.folder, world.adapter) if adapted else base_model(world.folder)
    model = CentralModel.load(world.folder, world.adapter if adapted else None, device="cpu", batch=4)
    done: list[int] = []
    found = await model.likelihoods(alternatives(), done.append)
    assert_close(found, [[naive(oracle, sample) for sample in group] for group in alternatives()])
    assert done == sorted(done)
    assert done[-1] == len(alternatives())
    texts = await model.continuations(PROMPTS, 9, done.append)
    assert texts == [_until_eos(greedy(oracle, prompt, 9)) for prompt in PROMPTS]


@pytest.mark.parametrize(("partition", "adapted", "sessions"), [("1,1", False, 16), ("2,1", True, 3), ("1,1", True, 2)])
async def test_the_split_model_answers_as_the_whole_one(
    world: World, partition: str, adapted: bool, sessions: int
) -> None:
    """With two sessions every alternative is forked by itself."""
    whole = CentralModel.load(world.folder, world.adapter if adapted else None, device="cpu")
    adapter = f"mine={world.adapter}" if adapted else None
    done: list[int] = []
    async with SplitModel.connect(world.settings(partition=partition, adapter=adapter), sessions) as split:
        found = await split.likelihoods(alternatives(), done.append)
        texts = await split.continuations(PROMPTS, 9, done.append)
    assert_close(found, await whole.likelihoods(alternatives(), lambda done: None))
    assert texts == await whole.continuations(PROMPTS, 9, lambda done: None)
    assert done == [*range(1, len(found) + 1), *range(1, len(texts) + 1)]


async def test_noise_changes_the_answers(world: World) -> None:
    async with SplitModel.connect(world.settings(noise="1.0"), 4) as split:
        noisy = await split.likelihoods(alternatives(), lambda done: None)
        again = await split.likelihoods(alternatives(), lambda done: None)
    async with SplitModel.connect(world.settings(), 4) as split:
        exact = await split.likelihoods(alternatives(), lambda done: None)
    assert_close(again, noisy)  # a function of the text
    assert max(abs(left[0] - right[0]) for left, right in zip(noisy, exact, strict=True)) > 0.5


async def test_what_is_intercepted_is_what_the_server_gets(world: World) -> None:
    public = PublicModel.open(world.folder, 1)
    attack = VocabularyMatching(public)
    async with SplitModel.connect(world.settings(), 2) as split:
        seen = await split.intercept(PROMPTS)
        bare = split.edge.model.bare_states(PROMPTS[3])
    torch.testing.assert_close(seen[3].rows, bare)
    assert run_attack("x", attack, seen, public.bos_token_id).share == 1.0
    async with SplitModel.connect(world.settings(noise="6.0"), 2) as split:
        hidden = await split.intercept(PROMPTS)
    assert run_attack("x", attack, hidden, public.bos_token_id).share < 0.3


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(2)] if 2 in tokens else tokens
