"""The draft head: it learns, says honestly how likely its guesses are, and keeps to the model that it is for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_client.speculation.draft_head import DraftHead, HeadShape
from edge_client.speculation.drafter import DraftRequest, Guesses
from edge_client.speculation.head_drafter import HeadDrafter
from edge_client.speculation.head_file import METADATA_KEY, TrainedHead, ends_digest, head_path, load_head, save_head
from edge_client.speculation.train_head import Positions, Recipe, Report, frequent_tokens, train_head
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.edge_slice import EdgeSlice
from split_llama.errors import CheckpointError, ModelMismatch, UsageError
from tests.edge_client.speculation.conftest import SHAPE, VOCABULARY, WIDTH, Language, following, fresh

RECIPE = Recipe(seconds=60, epochs=12, batch=64, steps=3, rate=5e-3)


@pytest.fixture(scope="session")
def learnt(language: Language) -> tuple[DraftHead, Tensor, Report]:
    with torch.random.fork_rng(devices=[]):
        return train_head(language.sequences(30, 60, 0), language.ends, RECIPE, shape=SHAPE)


@pytest.fixture(scope="session")
def drafter(learnt: tuple[DraftHead, Tensor, Report], language: Language) -> HeadDrafter:
    return HeadDrafter(TrainedHead(learnt[0], learnt[1], "", {}), language.ends.embedding, language.ends.lm_head)


def ask(language: Language, token: int, most: int = 8, least: float = 0.0) -> DraftRequest:
    return DraftRequest([1, 2, token], language.state(token), most, least)


def test_it_learns_a_language_that_can_be_learnt(learnt: tuple[DraftHead, Tensor, Report]) -> None:
    report = learnt[2]
    assert report.accuracy[0] > 0.9
    assert report.accuracy[-1] > 0.8
    assert len(report.accuracy) == RECIPE.steps
    assert report.positions + report.held_out == 30 * 60
    assert report.loss < 4


def test_it_guesses_what_comes(drafter: HeadDrafter, language: Language) -> None:
    right = 0
    for token in range(VOCABULARY):
        (guesses,) = drafter.propose([ask(language, token)])
        wanted, node = following(token), -1
        for _ in range(3):
            child = guesses.child(node, wanted)
            if child is None:
                break
            right, node, wanted = right + 1, child, following(wanted)
    assert right > 0.7 * 3 * VOCABULARY


def test_guesses_keep_to_what_is_asked(drafter: HeadDrafter, language: Language) -> None:
    for most, least in ((1, 0.0), (5, 0.0), (63, 0.0), (63, 0.3), (8, 1.0)):
        (guesses,) = drafter.propose([ask(language, 7, most, least)])
        assert len(guesses) <= most
        assert all(chance >= least for chance in guesses.chances)
        assert (
            sum(chance for chance, parent in zip(guesses.chances, guesses.parents, strict=True) if parent < 0) <= 1.001
        )
    assert len(drafter.propose([ask(language, 7, 63, 0.0)])[0]) == 63


def test_the_best_tree_is_found(drafter: HeadDrafter, language: Language) -> None:
    """Growing level by level leaves out no node that is among the likeliest: a larger tree begins with a smaller."""
    (large,) = drafter.propose([ask(language, 11, 63)])
    (small,) = drafter.propose([ask(language, 11, 6)])
    assert sorted(small.chances) == pytest.approx(sorted(large.chances, reverse=True)[:6][::-1], rel=1e-4)


def test_sessions_together_get_what_each_gets_alone(drafter: HeadDrafter, language: Language) -> None:
    requests = [ask(language, token, most, 0.01) for token, most in ((3, 4), (9, 16), (30, 1), (12, 40))]
    together = drafter.propose(requests)
    for request, guesses in zip(requests, together, strict=True):
        (alone,) = drafter.propose([request])
        assert _by_path(alone).keys() == _by_path(guesses).keys()
        assert _by_path(alone) == pytest.approx(_by_path(guesses), rel=1e-4)


def _by_path(guesses: Guesses) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(guesses.tokens, guesses.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, guesses.chances, strict=True))


def test_only_frequent_tokens_are_guessed(language: Language) -> None:
    sequences = language.sequences(12, 40, 3)
    head, vocabulary, _ = train_head(sequences, language.ends, replace(RECIPE, vocabulary=10, epochs=0.1), shape=SHAPE)
    assert len(vocabulary) == 10
    drafter = HeadDrafter(
        TrainedHead(head, vocabulary, "", {}), language.ends.embedding, language.ends.lm_head[vocabulary]
    )
    (guesses,) = drafter.propose([ask(language, 4, 63)])
    assert set(guesses.tokens) <= set(vocabulary.tolist())


def test_rare_tokens_fall_out_first() -> None:
    sequences: list[tuple[list[int], Tensor]] = [([3, 3, 3, 7, 7, 1], torch.zeros(6, 2))]
    assert frequent_tokens(sequences, 9, 2).tolist() == [3, 7]
    assert frequent_tokens(sequences, 9, 8).tolist() == [1, 3, 7]
    assert frequent_tokens(sequences, 9, 9).tolist() == list(range(9))


def test_the_same_seed_gives_the_same_head(language: Language) -> None:
    recipe = replace(RECIPE, epochs=0.3)
    heads = [train_head(language.sequences(6, 40, 2), language.ends, recipe, shape=SHAPE)[0] for _ in range(2)]
    other = train_head(language.sequences(6, 40, 2), language.ends, replace(recipe, seed=1), shape=SHAPE)[0]
    first, second, third = (head.state_dict()["read.weight"] for head in (*heads, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_it_stops_when_its_time_is_up(language: Language) -> None:
    shares: list[float] = []
    recipe = replace(RECIPE, seconds=0.3, epochs=10_000)
    _, _, report = train_head(
        language.sequences(6, 40, 2), language.ends, recipe, shape=SHAPE, progress=lambda share, _: shares.append(share)
    )
    assert 0 < report.steps < 10_000
    assert shares == sorted(shares)


def test_too_little_text_is_told(language: Language) -> None:
    for sequences in ([], language.sequences(1, 500, 0), language.sequences(9, 4, 0)):
        with pytest.raises(UsageError, match="too little to train"):
            train_head(sequences, language.ends, RECIPE)


def test_no_step_crosses_from_one_text_into_the_next() -> None:
    positions = Positions.join([([1, 2, 3], torch.zeros(3, 2)), ([4, 5], torch.zeros(2, 2))])
    assert positions.ends.tolist() == [3, 3, 3, 5, 5]
    assert positions.starts().tolist() == [0, 1, 3]


def test_a_file_gives_the_head_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = fresh(checkpoint)
    path = head_path(tmp_path, trained.ends)
    save_head(path, trained)
    again = load_head(path, trained.ends)
    assert again.vocabulary.tolist() == [5, 9, 300]
    assert again.training == {"positions": 12}
    assert again.head.shape == SHAPE
    for name, tensor in trained.head.state_dict().items():
        assert torch.allclose(again.head.state_dict()[name], tensor, atol=1e-3), name
    (guesses,) = HeadDrafter.open(path, checkpoint).propose([DraftRequest([4], torch.ones(WIDTH), 9, 0.0)])
    assert set(guesses.tokens) <= {5, 9, 300}


def test_a_head_of_another_model_is_refused(
    checkpoint: Checkpoint, other_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "head.safetensors"
    save_head(path, fresh(checkpoint))
    with pytest.raises(ModelMismatch, match="draft head for another model"):
        HeadDrafter.open(path, other_checkpoint)


def test_a_slice_has_the_digest_of_its_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Whatever the partition: a head serves them all."""
    digests = set()
    for partition in (Partition(1, 1), Partition(2, 0)):
        part = EdgeSlice(checkpoint, partition)
        folder = tmp_path / str(partition)
        folder.mkdir()
        for name, size in part.sizes.items():
            (folder / name).write_bytes(b"".join(part.read(name, 0, size)))
        digests.add(ends_digest(Checkpoint.open(folder)))
    assert digests == {ends_digest(checkpoint)}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "is no draft head"),
        ({"format": "something else"}, "is no draft head"),
        ({"version": 99}, "format version 99"),
        ({"width": -4}, "gives the sizes"),
        ({"hidden": 2**40}, "gives the sizes"),
        ({"hidden": 31}, "does not hold the tensors"),
        ({"ends": 5}, "does not say for which model"),
    ],
)
def test_foreign_files_are_told_apart(
    metadata: dict[str, object], said: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "head.safetensors"
    trained = fresh(checkpoint)
    save_head(path, trained)
    about = {"format": "fl-llama draft head", "version": 1, "width": WIDTH, "hidden": 32, "memory": 8} | {
        "ends": trained.ends,
        "training": {},
    }
    written = {METADATA_KEY: json.dumps(about | metadata)} if metadata else {"format": "pt"}
    save_file(load_file(path), path, written)
    with pytest.raises(CheckpointError, match=said):
        load_head(path, trained.ends)


def test_damaged_files_are_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path, trained = tmp_path / "head.safetensors", fresh(checkpoint)
    path.write_bytes(b"not a head at all")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_head(path, trained.ends)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_head(tmp_path / "missing.safetensors", trained.ends)
    trained.head.read.weight.data[0, 0] = float("nan")
    save_head(path, trained)
    with pytest.raises(CheckpointError, match="damaged"):
        load_head(path, trained.ends)


def test_tokens_outside_the_model_are_refused(checkpoint: Checkpoint) -> None:
    trained = replace(fresh(checkpoint), vocabulary=torch.tensor([5, 320]))
    with pytest.raises(ModelMismatch, match="other tokens"):
        HeadDrafter.of(trained, checkpoint)


def test_large_matrices_are_rounded_and_say_the_same() -> None:
    shape, draw = HeadShape(256, 1024, 64), torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DraftHead(shape)
    lm_head, embedding = torch.randn(5000, 256, generator=draw), torch.randn(5000, 256, generator=draw)
    drafter = HeadDrafter(TrainedHead(head, torch.arange(5000), "", {}), embedding, lm_head)
    state = torch.randn(256, generator=draw)
    (guesses,) = drafter.propose([DraftRequest([7], state, 5, 0.0)])
    with torch.no_grad():
        states, _ = head(state[None], embedding[7][None], head.begin(state[None]))
    exact = (states @ lm_head.t()).softmax(-1)[0]
    assert guesses.tokens[0] in exact.topk(3).indices.tolist()
    assert guesses.chances[0] == pytest.approx(float(exact[guesses.tokens[0]]), rel=0.2)
