"""What leaves a client: noise as at inference, gradients back through clipping, gradients with noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from split_llama.config import BlockRange
from split_llama.lora import LoraConfig
from split_llama.noise import NoiseChain, NoiseScope, NoiseSpec, PrefixNoise, apply, clip_rows
from training.client.privacy import GradientNoise, GradientSpec, StateNoise, adapter_digest
from training.compute.batch import Batch

SECRET, BOS, WIDTH = bytes(range(32)), 1, 16
SCOPE = NoiseScope("m" * 64, "", BlockRange(1, 3), WIDTH, NoiseSpec(0.1, clip=2.0), "float32")


def texts(*texts: list[int]) -> Batch:
    return Batch.of(texts, [[-100] * len(text) for text in texts])


def states(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def noise(spec: NoiseSpec) -> StateNoise:
    return StateNoise(spec, replace(SCOPE, spec=spec), SECRET, BOS)


def test_each_sequence_has_the_noise_that_inference_gives_it() -> None:
    spec = SCOPE.spec
    batch, rows = texts([BOS, 5, 6], [BOS, 5, 7, 8]), states(7)
    released = noise(spec).release(rows, batch, "").rows
    for start, tokens in ((0, [BOS, 5, 6]), (3, [BOS, 5, 7, 8])):
        chain = NoiseChain(PrefixNoise(SECRET, SCOPE))
        chain.append(tokens)
        some = rows[start : start + len(tokens)]
        assert torch.equal(
            released[start : start + len(tokens)], apply(spec, some, chain.unit_rows(chain.digests(0)), 1)
        )
    # BOS is the same for every text.
    assert torch.equal(released[[0, 3]], rows[[0, 3]])


def test_another_adapter_in_a_is_another_release_and_counts() -> None:
    batch, rows, noised = texts([BOS, 5, 6]), states(3), noise(SCOPE.spec)
    first = noised.release(rows, batch, "").rows
    assert noised.accountant.rows == 2
    assert torch.equal(noised.release(rows, batch, "").rows, first)
    assert noised.accountant.rows == 2
    assert not torch.equal(noised.release(rows, batch, "a" * 64).rows[1:], first[1:])
    assert noised.accountant.rows == 4


def test_without_noise_rows_go_as_they_are_and_nothing_is_counted() -> None:
    plain = noise(NoiseSpec(0.0))
    released = plain.release(states(3), texts([BOS, 5, 6]), "")
    assert torch.equal(released.rows, states(3))
    assert torch.equal(released.backward(states(3, 1)), states(3, 1))
    assert plain.accountant.rows == 0


def test_gradients_go_back_through_clipping_and_past_the_noise() -> None:
    batch, rows, grad = texts([BOS, 5, 6], [4, 5]), states(5), states(5, 1)
    leaf = rows.clone().requires_grad_(True)
    clipped = torch.cat((leaf[:1], clip_rows(leaf[1:], 2.0)))
    (clipped * grad).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(noise(SCOPE.spec).release(rows, batch, "").backward(grad), leaf.grad)


def test_gradients_are_clipped_row_by_row() -> None:
    grad = states(4) * 10
    out = GradientNoise(GradientSpec(clip=0.5), SECRET, "job").release(grad, 1, 0)
    torch.testing.assert_close(out.norm(dim=1), torch.full((4,), 0.5))
    torch.testing.assert_close(out / 0.5, grad / grad.norm(dim=1, keepdim=True))


def test_gradient_noise_is_repeatable_and_shared_by_no_two_gradients() -> None:
    spec = GradientSpec(sigma=0.2)
    grad = states(2000)
    first = GradientNoise(spec, SECRET, "job").release(grad, 1, 0)
    assert torch.equal(GradientNoise(spec, SECRET, "job").release(grad, 1, 0), first)
    added = (first - grad).numpy()
    assert np.std(added) == pytest.approx(0.2, rel=0.02)
    others = [
        GradientNoise(spec, SECRET, "job").release(grad, 2, 0) - grad,
        GradientNoise(spec, SECRET, "job").release(grad, 1, 1) - grad,
        GradientNoise(spec, SECRET, "other").release(grad, 1, 0) - grad,
        GradientNoise(spec, bytes(32), "job").release(grad, 1, 0) - grad,
        GradientNoise(spec, SECRET, "job").release(grad + 1, 1, 0) - grad - 1,
    ]
    assert all(abs(np.corrcoef(added.ravel(), other.numpy().ravel())[0, 1]) < 0.05 for other in others)


def test_an_adapter_that_adds_nothing_has_no_name_of_its_own() -> None:
    lora = LoraConfig(r=2, alpha=4, target_modules=("q_proj",))
    name = "model.layers.0.self_attn.q_proj"
    weights = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.zeros(4, 2)}
    assert adapter_digest(lora, weights) == ""
    weights[f"{name}.lora_B.weight"] = torch.ones(4, 2)
    trained = adapter_digest(lora, weights)
    assert len(trained) == 64
    weights[f"{name}.lora_B.weight"] = torch.full((4, 2), 2.0)
    assert adapter_digest(lora, weights) not in ("", trained)
