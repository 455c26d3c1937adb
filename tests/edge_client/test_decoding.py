"""The walk through a verified draft, by itself: the distribution of what is sampled is the model's own."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from edge_client.decoding import Decoder
from edge_client.draft import Decision, Draft
from edge_client.sampling import SamplingParams
from edge_client.speculation.drafter import Guesses
from edge_client.speculation.fixed_pace import FixedPace
from edge_client.turn import GenerationParams, Turn

VOCAB = 3
LENGTH = 3
RUNS = 4000
PROMPT = [0]


def logits_after(tokens: Sequence[int]) -> Tensor:
    """A model: any prefix has a distribution of its own, some tokens much likelier than others."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return torch.randn(VOCAB, generator=generator) * 1.5


def probability(answer: Sequence[int], temperature: float) -> float:
    chance = 1.0
    for at, token in enumerate(answer):
        chance *= float((logits_after([*PROMPT, *answer[:at]]) / temperature).softmax(-1)[token])
    return chance


@dataclass
class RandomTrees:
    """Guesses without any sense: right ones, wrong ones, several at one place."""

    draw: random.Random

    def guesses(self, most: int) -> Guesses:
        parents: list[int] = []
        tokens: list[int] = []
        for guess in range(most):
            parent = self.draw.randrange(-1, guess)
            free = {*range(VOCAB)} - {tokens[i] for i in range(guess) if parents[i] == parent}
            if free:
                parents.append(parent)
                tokens.append(self.draw.choice(sorted(free)))
            else:
                break
        chances = []
        for parent in parents:
            chances.append(0.5 * (1.0 if parent < 0 else chances[parent]))
        return Guesses(tuple(tokens), tuple(parents), tuple(chances))


def play(seed: int, trees: RandomTrees | None, temperature: float) -> tuple[list[int], int]:
    """Answer as the edge does, the whole model being `logits_after`; give the answer and the number of rounds."""
    sampling = SamplingParams(temperature=temperature, seed=seed)
    turn = Turn(GenerationParams(max_new_tokens=LENGTH, sampling=sampling), PROMPT, LENGTH, None)
    pace = FixedPace(4) if trees is not None else None
    decoder = Decoder(turn, PROMPT, pace=pace, max_rows=64, max_length=100)
    settled, rounds = list(PROMPT), 1
    decision = decoder.decide(None, logits_after(settled)[None], torch.zeros(1, 1))
    while decision.token is not None:
        draft = Draft(decision.token, trees.guesses(decision.request.max_guesses)) if _asks(decision, trees) else None
        root = draft or Draft(decision.token)
        rows = torch.stack([logits_after([*settled, *_branch(root, node)]) for node in range(len(root.tokens))])
        decision = decoder.decide(root, rows, torch.zeros(len(rows), 1))
        settled += [root.tokens[node] for node in decision.path]
        rounds += 1
    return turn.tokens, rounds


def _asks(decision: Decision, trees: RandomTrees | None) -> bool:
    return trees is not None and decision.request is not None


def _branch(draft: Draft, node: int) -> list[int]:
    bits = draft.tree[node]
    return [draft.tokens[above] for above in range(node + 1) if bits >> above & 1]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampling_keeps_the_exact_distribution(temperature: float) -> None:
    trees = RandomTrees(random.Random(1))
    played = [play(seed, trees, temperature) for seed in range(RUNS)]
    found = Counter(tuple(answer) for answer, _ in played)
    chi_square = 0.0
    for answer in itertools.product(range(VOCAB), repeat=LENGTH):
        expected = RUNS * probability(answer, temperature)
        chi_square += (found[answer] - expected) ** 2 / expected
    # 26 degrees of freedom: one sound sampler in 10,000 comes above 61 (a table of chi-square).
    assert chi_square < 61
    assert sum(rounds for _, rounds in played) < 0.9 * RUNS * LENGTH


def test_a_seed_gives_the_same_answer_with_any_drafts() -> None:
    for seed in range(200):
        plain, rounds = play(seed, None, 1.0)
        assert rounds == LENGTH
        for trees in (RandomTrees(random.Random(seed)), RandomTrees(random.Random(-seed))):
            assert play(seed, trees, 1.0)[0] == plain


def test_drafts_stay_inside_answer_frame_and_context() -> None:
    turn = Turn(GenerationParams(max_new_tokens=50), PROMPT, 50, None)
    wish = FixedPace(63)
    for max_rows, max_length, most in ((64, 1000, 48), (8, 1000, 7), (64, 10, 8)):
        decoder = Decoder(turn, PROMPT, pace=wish, max_rows=max_rows, max_length=max_length)
        decision = decoder.decide(None, torch.zeros(1, VOCAB), torch.zeros(1, 1))
        assert decision.request is not None
        assert decision.request.max_guesses == most
        turn = Turn(GenerationParams(max_new_tokens=50), PROMPT, 50, None)
    decoder = Decoder(turn, PROMPT, pace=wish, max_rows=64, max_length=2)
    assert decoder.decide(None, torch.zeros(1, VOCAB), torch.zeros(1, 1)).request is None
