from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from split_chain import (
    CPU,
    Chain,
    assert_equal,
    grads,
    leaves,
    open_checkpoint,
    padded,
    peft_twin,
    random_batch,
    random_weights,
    trained,
)

from split_llama.config import Partition
from split_llama.errors import UsageError
from split_llama.lora import LoraConfig
from training.compute import ends as ends_module
from training.compute.aggregate import Contribution, Rule, combine
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.compute.lora import DropoutKey, Group, take_gradients
from training.compute.tape import finish

LORA = LoraConfig(4, 8)


@pytest.fixture
def folder(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint()


def test_targets_are_transformers_shift_and_never_cross_sequences() -> None:
    batch = Batch.of([[5, 6, 7], [8, 9], [4]], [[5, -100, 7], [8, 9], [4]])
    rows, wanted = batch.targets()
    assert rows.tolist() == [1, 3]
    assert wanted.tolist() == [7, 9]
    assert batch.target_count == 2
    labels = padded(batch)["labels"]
    assert int((labels[:, 1:] != -100).sum()) == 2


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(2, 1\) tokens and \(2, 2\) labels"):
        Batch.of([[1, 2], [3]], [[1, 2], [3, 4]])


def test_the_head_in_pieces_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends.load(open_checkpoint(folder), Partition(1, 1), LORA)
    batch, states = random_batch(320, (30, 9)), torch.randn(39, 32)
    weights = ends.first_weights(0)
    whole = ends.loss(states, batch, leaves(weights), None)
    monkeypatch.setattr(ends_module, "LOGITS_AT_ONCE", 320 * 4)
    pieces = ends.loss(states, batch, leaves(weights), None)
    assert pieces.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    torch.testing.assert_close(pieces.grad, whole.grad)
    assert ends.score(states, batch, weights) == pytest.approx((whole.loss_sum, whole.targets), rel=1e-6)


def test_a_batch_without_targets_teaches_nothing(folder: Path) -> None:
    ends = Ends.load(open_checkpoint(folder), Partition(1, 1), LORA)
    batch = Batch.of([[5, 6, 7]], [[-100, -100, -100]])
    weights = leaves(ends.first_weights(0))
    loss = ends.loss(torch.randn(3, 32), batch, weights, None)
    assert (loss.loss_sum, loss.targets) == (0.0, 0)
    assert loss.grad.shape == (3, 32)
    assert not loss.grad.any()
    assert all(leaf.grad is None for leaf in weights.values())


def test_adapters_may_be_in_one_segment_only(folder: Path) -> None:
    for segments, block in ((("A",), 0), (("C",), 3), (("A", "B", "C"), None)):
        ends = Ends.load(open_checkpoint(folder), Partition(1, 1), LORA, segments)
        weights = leaves(ends.first_weights(0))
        assert {int(name.split(".")[2]) for name in weights} == ({0, 3} if block is None else {block})
        batch = random_batch(320, (11,))
        rows, tape = ends.forward_a(batch, weights, None)
        assert (tape is None) == (segments == ("C",))
        loss = ends.loss(rows, batch, weights, None)
        ends.backward_a(tape, loss.grad)
        assert all(grad.any() for name, grad in grads(weights).items() if "lora_B" in name)
    frozen = Ends.load(open_checkpoint(folder), Partition(1, 1), LORA, ())
    assert frozen.first_weights(0) == {}
    assert frozen.loss(torch.randn(11, 32), batch, {}, None).grad.any()


def test_recomputing_at_the_ends_gives_the_same(folder: Path) -> None:
    lora, batch, key = LoraConfig(4, 8, dropout=0.2), random_batch(320, (30, 9)), DropoutKey(0, "a", 1, 0)
    weights = random_weights(open_checkpoint(folder), lora)
    kept, again = leaves(weights), leaves(weights)
    assert Chain.load(folder, lora, "2,1").run(batch, kept, key) == Chain.load(folder, lora, "2,1", keep=False).run(
        batch, again, key
    )
    expected = grads(kept)
    assert all(torch.equal(grad, expected[name]) for name, grad in grads(again).items())


def test_a_clients_batch_combined_is_centralized_training_on_the_joined_batch(folder: Path) -> None:
    """M clients, B in one pass, gradients kept apart and combined by tokens: transformers' mean loss of all rows."""
    lengths = [(30, 9), (17,), (5, 5, 12)]
    checkpoint = open_checkpoint(folder)
    weights = random_weights(checkpoint, LORA)
    chain = Chain.load(folder, LORA)
    batches = [random_batch(checkpoint.config.vocab_size, some, seed) for seed, some in enumerate(lengths)]
    clients = [leaves(weights) for _ in batches]

    forwards = [chain.ends.forward_a(batch, own, None) for batch, own in zip(batches, clients, strict=True)]
    groups = [Group(batch.ragged.lengths, own) for batch, own in zip(batches, clients, strict=True)]
    tape = finish(chain.b.forward(torch.cat([rows for rows, _ in forwards]), groups, keep=True))
    outputs = tape.output.split([group.rows for group in groups])
    losses = [
        chain.ends.loss(states, batch, own, None) for states, batch, own in zip(outputs, batches, clients, strict=True)
    ]
    back = finish(tape.backward(torch.cat([loss.grad for loss in losses]))).split([group.rows for group in groups])
    for (_, tape_a), grad in zip(forwards, back, strict=True):
        chain.ends.backward_a(tape_a, grad)
    contributions = [
        Contribution(str(index), loss.targets, 1, take_gradients(own))
        for index, (loss, own) in enumerate(zip(losses, clients, strict=True))
    ]
    combined = combine(contributions, Rule())

    everything = [
        (ids.tolist(), labels.tolist())
        for batch in batches
        for ids, labels in zip(
            batch.token_ids.split(list(batch.ragged.lengths)),
            batch.labels.split(list(batch.ragged.lengths)),
            strict=True,
        )
    ]
    joined = Batch.of([ids for ids, _ in everything], [labels for _, labels in everything])
    model = peft_twin(folder, LORA, weights)
    loss = model(**padded(joined), use_cache=False).loss
    loss.backward()
    assert combined.targets == joined.target_count
    assert sum(one.loss_sum for one in losses) / combined.targets == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_equal(combined.grads, grads(trained(model)))


def test_ends_of_the_wrong_partition_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="leaves no block for the server"):
        Ends.load(open_checkpoint(folder), Partition(2, 2), LORA, device=CPU)
