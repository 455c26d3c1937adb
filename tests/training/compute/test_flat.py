"""Named tensors in a flat one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from split_llama.errors import UsageError
from training.compute.aggregate import Contribution, Rule, combine
from training.compute.averaging import average
from training.compute.flat import PIECE, FlatTensors, Layout
from training.compute.optimizer import AdapterOptimizer
from training.job_config import OptimizerPart

SHAPES = {"b": (3, 4), "a": (2, 5), "none": (0, 2), "c": (7,)}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_what_goes_in_comes_out_whatever_the_order() -> None:
    given_tensors, layout = tensors(), Layout(SHAPES)
    shuffled = {name: given_tensors[name].requires_grad_(True) for name in sorted(given_tensors)}
    packed = layout.pack(shuffled)
    assert list(packed) == list(SHAPES)
    assert len(packed) == 4
    assert packed.flat.shape == (layout.size,) == (29,)
    for name, tensor in given_tensors.items():
        assert torch.equal(packed[name], tensor)
        assert not packed[name].requires_grad
    packed.flat.zero_()
    assert not packed["b"].any(), "they are views"
    assert given_tensors["b"].any()


def test_what_is_flat_is_not_copied() -> None:
    packed = FlatTensors.of(tensors())
    assert Layout(SHAPES).pack(packed) is packed
    assert FlatTensors.of(packed) is packed
    other = Layout(dict(sorted(SHAPES.items()))).pack(packed)
    assert other.flat.data_ptr() != packed.flat.data_ptr()
    assert all(torch.equal(other[name], packed[name]) for name in SHAPES)


def test_parts_are_joined_and_taken_off_again() -> None:
    first, second = FlatTensors.of({"x": torch.ones(2)}), FlatTensors.of({"y": torch.full((3,), 2.0)})
    nothing, layout = FlatTensors.of({}), Layout({"x": (2,), "y": (3,)})
    joined = layout.joined(first, nothing, second)
    assert joined.flat.tolist() == [1, 1, 2, 2, 2]
    assert joined.head(first.layout)["x"].data_ptr() == joined.flat.data_ptr()
    assert first.layout.joined(nothing, first).flat is first.flat
    assert nothing.layout.joined(nothing, nothing).flat.shape == (0,)
    with pytest.raises(AssertionError):
        joined.head(second.layout)
    with pytest.raises(AssertionError):
        layout.joined(first)


def test_what_does_not_fit_is_refused_by_name() -> None:
    layout = Layout(SHAPES)
    for wrong, said in (
        ({name: tensor for name, tensor in tensors().items() if name != "c"}, "c is in only one"),
        (tensors() | {"more": torch.ones(1)}, "more is in only one"),
        (tensors() | {"a": torch.ones(5, 2)}, r"a has shape \(5, 2\), expected \(2, 5\)"),
    ):
        with pytest.raises(UsageError, match=said):
            layout.pack(wrong)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32), max_size=20),
    ahead=st.sampled_from([0, 1, PIECE - 1, PIECE, 2 * PIECE + 3]),
)
def test_finite_and_norm_are_those_of_every_value(values: list[float], ahead: int) -> None:
    flat = torch.cat([torch.zeros(ahead), torch.tensor(values, dtype=torch.float32)])
    packed = FlatTensors(Layout({"w": flat.shape}), flat)
    assert packed.is_finite == all(math.isfinite(value) for value in values)
    assert (packed.norm < math.inf) == packed.is_finite
    if packed.is_finite:
        assert packed.norm == pytest.approx(math.hypot(*values), rel=1e-12)


def test_it_is_no_inference_tensor_in_inference_mode() -> None:
    with torch.inference_mode():
        packed = Layout(SHAPES).zeros(torch.device("cpu"))
        joined = Layout({"x": (2,)}).joined(FlatTensors.of({"x": torch.ones(2)}))
        views = [packed["a"], joined["x"], joined.head(joined.layout)["x"]]
    assert not any(view.is_inference() for view in views)


@pytest.mark.parametrize("kind", ["tokens", "paper-sum", "median", "trimmed-mean"])
def test_aggregating_flat_is_aggregating_each_tensor(kind: str) -> None:
    """Also across the pieces in which sorting goes."""
    shapes = {"w": (3, 5), "wide": (PIECE // 4, 5)}
    grads = [
        {name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for name, shape in shapes.items()}
        for seed in range(4)
    ]
    whole = combine([Contribution(str(n), n + 1, 1, FlatTensors.of(each)) for n, each in enumerate(grads)], Rule(kind))
    for name in shapes:
        alone = combine(
            [Contribution(str(n), n + 1, 1, {name: each[name]}) for n, each in enumerate(grads)], Rule(kind)
        )
        torch.testing.assert_close(whole.grads[name], alone.grads[name], rtol=1e-6, atol=1e-7)


def test_nobody_changes_what_was_given() -> None:
    given_grads = FlatTensors.of(tensors(1))
    before = given_grads.flat.clone()
    for rule in (Rule(), Rule("median"), Rule(max_norm=1e-3)):
        combine([Contribution("a", 2, 1, given_grads), Contribution("b", 2, 1, given_grads)], rule)
    assert average([given_grads, given_grads], [1.0, 3.0]).flat.data_ptr() != given_grads.flat.data_ptr()
    optimizer = AdapterOptimizer(given_grads, OptimizerPart(max_grad_norm=1e-3))
    optimizer.step(given_grads, 0.1)
    optimizer.step(FlatTensors.of(tensors(2)), 0.1)
    assert torch.equal(given_grads.flat, before)


def test_flat_gradients_step_as_named_ones_do() -> None:
    one, other = (AdapterOptimizer(tensors(), OptimizerPart(max_grad_norm=0.5)) for _ in range(2))
    for step in range(3):
        one.step(tensors(step), 0.1)
        other.step(FlatTensors.of(tensors(step)), 0.1)
    assert torch.equal(one.values.flat, other.values.flat)
    other.replace(FlatTensors.of(tensors(9)))
    assert torch.equal(other.values.flat, FlatTensors.of(tensors(9)).flat)
    assert torch.equal(other.weights["a"], tensors(9)["a"])
