from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from peft_oracle import ALL
from split_chain import CPU, assert_equal, grads, leaves, open_checkpoint, random_weights
from torch import Tensor

from split_llama.config import BlockRange
from split_llama.errors import UsageError
from split_llama.layers import FusedLinear
from split_llama.load import load_segment
from split_llama.lora import LoraConfig
from training.compute.lora import DropoutKey, Group, leaves_of
from training.compute.ragged import Ragged, RaggedAttention
from training.compute.tape import Tape, Trunk, finish

LORA = LoraConfig(4, 8, target_modules=ALL)
DROPPING = LoraConfig(4, 8, dropout=0.25, target_modules=ALL)
MIDDLE = BlockRange(1, 4)


@pytest.fixture
def folder(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint(family="mistral", layers=5)


def trunk(folder: Path, lora: LoraConfig | None = LORA) -> Trunk:
    return Trunk(load_segment(open_checkpoint(folder), MIDDLE, dtype=torch.float32, device=CPU), lora)


def group(folder: Path, lengths: tuple[int, ...], seed: int = 0, *, drop: bool = False) -> Group:
    weights = random_weights(open_checkpoint(folder), LORA, seed)
    return Group(lengths, leaves(weights), DropoutKey(0, f"client-{seed}", 1, 0) if drop else None)


def states(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def in_middle(group: Group) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in group.weights.items() if int(name.split(".")[2]) in range(1, 4)}


def run(
    trunk: Trunk, rows: Tensor, groups: Sequence[Group], upstream: Tensor, *, keep: bool = True
) -> tuple[Tensor, Tensor]:
    tape = finish(trunk.forward(rows, groups, keep=keep))
    return tape.output, finish(tape.backward(upstream))


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
def test_keeping_graphs_equals_computing_them_again(folder: Path, drop: bool) -> None:
    model = trunk(folder, DROPPING)
    one, other = group(folder, (30, 7), drop=drop), group(folder, (30, 7), drop=drop)
    kept = run(model, states(37), [one], states(37, 1), keep=True)
    again = run(model, states(37), [other], states(37, 1), keep=False)
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])
    expected = grads(in_middle(one))
    assert all(torch.equal(found, expected[name]) for name, found in grads(in_middle(other)).items())


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
def test_one_pass_of_groups_equals_a_pass_each(folder: Path, drop: bool) -> None:
    model = trunk(folder, DROPPING)
    shapes = [(30, 7), (12,), (5, 5, 21)]
    together = [group(folder, lengths, seed, drop=drop) for seed, lengths in enumerate(shapes)]
    alone = [group(folder, lengths, seed, drop=drop) for seed, lengths in enumerate(shapes)]
    sizes = [part.rows for part in alone]
    rows, upstream = states(sum(sizes)), states(sum(sizes), 1)
    output, back = run(model, rows, together, upstream)
    parts = zip(rows.split(sizes), upstream.split(sizes), output.split(sizes), back.split(sizes), strict=True)
    for one, joint, (x, grad, found, found_back) in zip(alone, together, parts, strict=True):
        expected, expected_back = run(model, x, [one], grad)
        assert_equal({"out": found, "back": found_back}, {"out": expected, "back": expected_back})
        assert_equal(grads(in_middle(joint)), grads(in_middle(one)))


def test_gradients_add_up_over_passes_and_stay_in_their_group(folder: Path) -> None:
    model = trunk(folder)
    shared = random_weights(open_checkpoint(folder), LORA)
    one, other = Group((9,), leaves_of(shared)), Group((4,), leaves_of(shared))
    run(model, states(13), [one, other], states(13, 1))
    first = {name: grad.clone() for name, grad in grads(in_middle(one)).items()}
    run(model, states(9), [Group((9,), one.weights)], states(13, 1)[:9])
    assert_equal(grads(in_middle(one)), {name: 2 * grad for name, grad in first.items()})
    only = Group((4,), leaves_of(shared))
    run(model, states(13)[9:], [only], states(13, 1)[9:])
    assert_equal(grads(in_middle(other)), grads(in_middle(only)))


def test_a_group_may_have_no_gradient_no_weights_or_no_rows(folder: Path) -> None:
    model = trunk(folder)
    learning, silent = group(folder, (9,)), group(folder, (4, 2), seed=1)
    frozen, absent = Group((3,), {}), group(folder, (), seed=2)
    upstream = states(18, 1)
    upstream[9:15] = 0.0
    _, back = run(model, states(18), [learning, silent, absent, frozen], upstream)
    assert all(not grad.any() for grad in grads(in_middle(silent)).values())
    assert all(leaf.grad is None for leaf in absent.weights.values())
    assert not back[9:15].any()
    assert back[15:].abs().min() > 0
    alone = group(folder, (9,))
    run(model, states(9), [alone], upstream[:9])
    assert_equal(grads(in_middle(learning)), grads(in_middle(alone)))


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4)], ids=["even", "uneven"])
@pytest.mark.parametrize("where", ["states", "gradient"])
def test_one_clients_nan_reaches_no_other(folder: Path, where: str, lengths: tuple[int, int]) -> None:
    model, sizes = trunk(folder), list(lengths)
    spoiled, other = group(folder, lengths[:1]), group(folder, lengths[1:], seed=1)
    rows, upstream = states(sum(sizes)), states(sum(sizes), 1)
    clean = group(folder, lengths[:1]), group(folder, lengths[1:], seed=1)
    expected, expected_back = run(model, rows, clean, upstream)
    (rows if where == "states" else upstream)[2] = float("nan")
    output, back = run(model, rows, [spoiled, other], upstream)
    assert torch.equal(output[sizes[0] :], expected[sizes[0] :])
    assert torch.equal(back[sizes[0] :], expected_back[sizes[0] :])
    unspoiled = grads(in_middle(clean[1]))
    assert all(torch.equal(grad, unspoiled[name]) for name, grad in grads(in_middle(other)).items())
    assert any(grad.isnan().any() for grad in grads(in_middle(spoiled)).values())


def test_a_base_without_adapters_passes_the_gradient_through(folder: Path) -> None:
    rows = states(6).requires_grad_(True)
    model = trunk(folder, None)
    output, back = run(model, rows, [Group((6,), {})], states(6, 1))
    segment = model.segment
    attend = RaggedAttention(Ragged((6,)), segment.config.sliding_windows, CPU)
    expected = segment(MIDDLE, rows, torch.arange(6), attend)
    assert torch.equal(output, expected)
    torch.testing.assert_close(back, torch.autograd.grad(expected, rows, states(6, 1))[0])


@pytest.mark.parametrize("keep", [True, False])
def test_it_pauses_after_every_block_and_leaves_nothing_behind(folder: Path, keep: bool) -> None:
    model = trunk(folder)
    matrices = [module for module in model.segment.modules() if isinstance(module, FusedLinear)]

    def untouched() -> bool:
        return not torch.is_grad_enabled() and all(matrix.low_rank is None for matrix in matrices)

    with torch.no_grad():
        forward, pauses = model.forward(states(5), [group(folder, (5,))], keep=keep), 0
        tape: Tape | None = None
        while tape is None:
            try:
                next(forward)
                pauses += 1
                assert untouched()
            except StopIteration as end:
                tape = end.value
        sizes = [tape.nbytes]
        for _ in tape.backward(states(5, 1)):
            sizes.append(tape.nbytes)
            assert untouched()
    assert pauses == len(MIDDLE)
    assert len(sizes) == len(MIDDLE) + 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_it_trains_within_inference_mode(folder: Path) -> None:
    """A server's computing thread is in inference mode for good."""
    expected = group(folder, (6,))
    run(trunk(folder), states(6), [expected], states(6, 1))
    with torch.inference_mode():
        found = group_in_normal_mode(folder)
        model = trunk_in_normal_mode(folder)
        for keep in (True, False):
            _, back = run(model, states(6), [found], states(6, 1), keep=keep)
            assert torch.is_inference_mode_enabled()
    assert not back.is_inference()
    assert_equal(grads(in_middle(found)), {name: 2 * grad for name, grad in grads(in_middle(expected)).items()})


def group_in_normal_mode(folder: Path) -> Group:
    with torch.inference_mode(False):
        return group(folder, (6,))


def trunk_in_normal_mode(folder: Path) -> Trunk:
    with torch.inference_mode(False):
        return trunk(folder)


def test_an_error_in_a_block_leaves_no_update_behind(folder: Path) -> None:
    model = trunk(folder)
    lacking = group(folder, (5,))
    weights = {name: leaf for name, leaf in lacking.weights.items() if ".2." not in name}
    with pytest.raises(KeyError):
        finish(model.forward(states(5), [Group((5,), weights)], keep=True))
    matrices = [module for module in model.segment.modules() if isinstance(module, FusedLinear)]
    assert all(matrix.low_rank is None for matrix in matrices)


def test_a_block_is_free_once_it_has_gone_back(folder: Path) -> None:
    tape = finish(trunk(folder).forward(states(5), [group(folder, (5,))], keep=True))
    outputs = [weakref.ref(held.output) for held in tape._held]
    freed = []
    for _ in tape.backward(states(5, 1)):
        freed.append([reference() is None for reference in outputs])
    assert [sum(flags) for flags in freed] == [1, 2, 3]
    assert tape.nbytes == tape.output.nbytes


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lengths", [(64,), (40, 40), (50, 30, 8)], ids=str)
@pytest.mark.parametrize("lora", [None, LoraConfig(4, 8), DROPPING], ids=["base", "attention", "all"])
def test_the_estimate_is_close_to_what_autograd_saves(
    tiny_checkpoint: TinyCheckpoint, family: str, lengths: tuple[int, ...], lora: LoraConfig | None
) -> None:
    folder = tiny_checkpoint(family=family, layers=5, hidden=64, intermediate=160)
    model = trunk(folder, lora)
    rows = sum(lengths)
    weights = {} if lora is None else leaves(random_weights(open_checkpoint(folder), lora))
    groups = [Group(lengths, weights, DropoutKey(0, "a", 1, 0))]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.segment.parameters(), *weights.values())}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        tape = finish(model.forward(torch.randn(rows, 64), groups, keep=True))
    assert tape.nbytes == pytest.approx(sum(saved.values()) + tape.output.nbytes, rel=0.2)
    again = finish(model.forward(torch.randn(rows, 64), groups, keep=False))
    assert again.nbytes == (len(MIDDLE) + 1) * rows * 64 * 4


def test_what_does_not_fit_is_refused_at_once(folder: Path) -> None:
    model, one = trunk(folder), group(folder, (5,))
    for rows in (states(6), torch.zeros(5, 31), torch.zeros(0, 32)):
        with pytest.raises(UsageError, match=r"5 of width 32 .* got states of the shape"):
            model.forward(rows, [one], keep=True)
    with pytest.raises(UsageError, match="at least one"):
        model.forward(torch.zeros(0, 32), [], keep=True)
    tape = finish(model.forward(states(5), [one], keep=True))
    with pytest.raises(UsageError, match=r"shape \(5, 32\) was expected, got \(4, 32\)"):
        tape.backward(states(4))
    finish(tape.backward(states(5)))
    with pytest.raises(UsageError, match="went back already"):
        tape.backward(states(5))


def test_a_span_runs_only_its_blocks(folder: Path) -> None:
    model, one, other = trunk(folder), group(folder, (5,)), group(folder, (5,))
    whole, back = run(model, states(5), [one], states(5, 1))
    first = finish(model.forward(states(5), [other], keep=True, span=BlockRange(1, 2)))
    rest = finish(model.forward(first.output, [other], keep=True, span=BlockRange(2, 4)))
    assert torch.equal(rest.output, whole)
    middle = finish(rest.backward(states(5, 1)))
    assert torch.equal(finish(first.backward(middle)), back)
    assert_equal(grads(in_middle(other)), grads(in_middle(one)))
