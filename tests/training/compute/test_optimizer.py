from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from split_llama.errors import CheckpointError, UsageError
from training.compute.optimizer import AdapterOptimizer
from training.job_config import OptimizerPart

SPEC = OptimizerPart(lr=1e-2, weight_decay=0.05, betas=(0.8, 0.95), max_grad_norm=1.0)


def params(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("b", (3, 4)), ("a", (2, 5)))}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_it_equals_torchs_adamw_with_clip_grad_norm() -> None:
    optimizer = AdapterOptimizer(params(), SPEC)
    plain = {name: tensor.clone().requires_grad_(True) for name, tensor in params().items()}
    adam = torch.optim.AdamW(plain.values(), lr=1.0, betas=SPEC.betas, eps=SPEC.eps, weight_decay=SPEC.weight_decay)
    for step in range(8):
        grads = {name: tensor * (0.01 if step % 2 else 3.0) for name, tensor in params(step + 1).items()}
        report = optimizer.step(grads, lr=0.01 * (step + 1))
        for name, tensor in plain.items():
            tensor.grad = grads[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(plain.values(), 1.0)
        adam.param_groups[0]["lr"] = 0.01 * (step + 1)
        adam.step()
        assert report.applied
        assert report.norm == pytest.approx(float(norm))
        for name, tensor in plain.items():
            torch.testing.assert_close(optimizer.weights[name], tensor, rtol=1e-6, atol=1e-7)


def test_weights_stay_the_same_objects() -> None:
    optimizer = AdapterOptimizer(params(), SPEC)
    before = dict(optimizer.weights)
    optimizer.step(params(1), 0.1)
    optimizer.replace(params(2))
    assert all(optimizer.weights[name] is leaf and leaf.requires_grad and leaf.is_leaf for name, leaf in before.items())
    assert equal({name: leaf.detach() for name, leaf in before.items()}, params(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    optimizer = AdapterOptimizer(params(), SPEC)
    optimizer.step(params(1), 0.1)
    before = optimizer.tensors()
    grads = params(2)
    grads["a"][1, 1] = bad
    report = optimizer.step(grads, 0.1)
    assert not report.applied
    assert not math.isfinite(report.norm)
    assert equal(optimizer.tensors(), before)


@pytest.mark.parametrize("steps", [0, 3])
def test_the_state_goes_through_a_file_to_the_bit(steps: int) -> None:
    optimizer, other = AdapterOptimizer(params(), SPEC), AdapterOptimizer(params(9), SPEC)
    for step in range(steps):
        optimizer.step(params(step), 0.1)
    other.step(params(7), 0.1)
    other.load(load(save(optimizer.tensors())))
    assert equal(other.tensors(), optimizer.tensors())
    for step in range(3):
        optimizer.step(params(20 + step), 0.1)
        other.step(params(20 + step), 0.1)
    assert equal(other.tensors(), optimizer.tensors())
    assert not equal(optimizer.tensors(), AdapterOptimizer(params(), SPEC).tensors())


def test_what_tensors_gives_does_not_change_with_later_steps() -> None:
    optimizer = AdapterOptimizer(params(), SPEC)
    optimizer.step(params(1), 0.1)
    kept = optimizer.tensors()
    copy = {name: tensor.clone() for name, tensor in kept.items()}
    optimizer.step(params(2), 0.1)
    assert equal(kept, copy)


def test_it_steps_in_inference_mode() -> None:
    with torch.inference_mode():
        inside = AdapterOptimizer(params(), SPEC)
        inside.step(params(1), 0.1)
    outside = AdapterOptimizer(params(), SPEC)
    outside.step(params(1), 0.1)
    assert equal(inside.tensors(), outside.tensors())
    (inside.weights["a"] * 2).sum().backward()
    assert inside.weights["a"].grad is not None


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    optimizer = AdapterOptimizer(params(), SPEC)
    optimizer.step(params(1), 0.1)
    before = optimizer.tensors()
    with pytest.raises(UsageError, match=r"gradients .* b is in only one"):
        optimizer.step({"a": params()["a"]}, 0.1)
    with pytest.raises(UsageError, match=r"a has shape \(5, 2\), expected \(2, 5\)"):
        optimizer.replace({"a": params()["a"].t(), "b": params()["b"]})
    for spoiled in (
        {name: tensor for name, tensor in before.items() if name != "step"},
        {name: tensor for name, tensor in before.items() if name != "exp_avg/a"},
        before | {"exp_avg_sq/a": torch.zeros(3)},
        before | {"more": torch.zeros(3)},
    ):
        with pytest.raises(CheckpointError):
            optimizer.load(spoiled)
    with pytest.raises(UsageError, match="at least one weight"):
        AdapterOptimizer({}, SPEC)
    assert equal(optimizer.tensors(), before)
