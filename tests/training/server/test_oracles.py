"""Split fine-tuning is training in one place: for each strategy, in fp32, against a plain loop over the whole model."""

from __future__ import annotations

import pytest
import torch

from tests.training.server.central import Central, federated, joined
from tests.training.server.world import World, adapters, batches, close_to, config_of, train
from training.job_config import LoraPart, OptimizerPart

TOLERANCE = 5e-6


@pytest.mark.parametrize("accumulate", [1, 3])
async def test_client_batch_equals_training_on_the_joined_batch(world: World, accumulate: int) -> None:
    config = config_of(strategy="client-batch", clients=3, accumulate=accumulate, max_micros=2)
    job, clients = await train(world, config)
    central = Central(world, config)
    data = [batches(f"client-{number}", world.config.vocab_size) for number in range(3)]
    for step in range(1, 5):
        parts = [each((step - 1) * accumulate + micro) for micro in range(accumulate) for each in data]
        loss = central.step(step, joined(parts))
        for client in clients:
            assert client.outcomes[step - 1].loss == pytest.approx(loss, abs=1e-5)
            assert client.outcomes[step - 1].included
    close_to(await adapters(job), central.weights, TOLERANCE)
    for client in clients:
        close_to(client.weights, {name: central.weights[name] for name in client.weights}, TOLERANCE)


async def test_a_closed_window_changes_nothing(world: World) -> None:
    config = config_of(strategy="client-batch", clients=2, accumulate=2, max_micros=1)
    job, clients = await train(world, config, keeps_window=False)
    # The scripted clients send both at once: the second is refused, and each step has one only.
    assert {type(error).__name__ for client in clients for error in client.errors} == {"WindowExceeded"}
    assert job.record.step == 4


async def test_sequential_equals_a_plain_loop(world: World) -> None:
    config = config_of(strategy="sequential", clients=2, turn_steps=2, steps=6)
    job, clients = await train(world, config)
    central = Central(world, config)
    data = [batches(f"client-{number}", world.config.vocab_size) for number in range(2)]
    used = [0, 0]
    for step in range(1, 7):
        who = (step - 1) // 2 % 2
        loss = central.step(step, data[who](used[who]))
        used[who] += 1
        assert clients[who].losses[step] == pytest.approx(loss, abs=1e-5)
        assert [client.outcomes[step - 1].included for client in clients] == [who == 0, who == 1]
    close_to(await adapters(job), central.weights, TOLERANCE)


async def test_hierarchical_equals_separate_runs_that_are_averaged(world: World) -> None:
    # Each party clips its own part of the gradient there, so nothing may be clipped.
    optimizer = OptimizerPart(lr=1e-2, eps=1e-5, schedule="cosine", warmup_steps=1, max_grad_norm=None)
    config = config_of(
        strategy="server-hierarchical", clients=3, average_every=2, steps=5, accumulate=2, optimizer=optimizer
    )
    job, clients = await train(world, config)
    runs = [Central(world, config) for _ in range(3)]
    data = [batches(f"client-{number}", world.config.vocab_size) for number in range(3)]
    for step in range(1, 6):
        for run, each in zip(runs, data, strict=True):
            run.step(step, joined([each(2 * step - 2), each(2 * step - 1)]))
        if step in (2, 4, 5):
            federated(runs, [1.0, 1.0, 1.0])
    close_to(await adapters(job), runs[0].weights, TOLERANCE)
    for client in clients:
        close_to(client.weights, {name: runs[0].weights[name] for name in client.weights}, TOLERANCE)
        assert [outcome.step for outcome in client.outcomes] == [1, 2, 3, 4, 5]


async def test_private_ends_of_one_client_equal_training_in_one_place_too(world: World) -> None:
    optimizer = OptimizerPart(lr=1e-2, eps=1e-5, max_grad_norm=None)
    config = config_of(strategy="client-batch", clients=1, shared="B", optimizer=optimizer)
    job, (client,) = await train(world, config)
    central = Central(world, config)
    data = batches("client-0", world.config.vocab_size)
    for step in range(1, 5):
        central.step(step, data(step - 1))
    weights = await adapters(job)
    assert not set(weights) & set(client.weights)
    close_to(weights | client.weights, central.weights, TOLERANCE)


@pytest.mark.parametrize("shared", ["B", "A,B,C"])
@pytest.mark.parametrize("strategy", ["client-batch", "server-hierarchical"])
async def test_a_server_without_adapters_passes_gradients_through(world: World, shared: str, strategy: str) -> None:
    optimizer = OptimizerPart(lr=1e-2, eps=1e-5, max_grad_norm=None)
    lora = LoraPart(r=4, segments=("A", "C"))
    config = config_of(strategy=strategy, clients=1, shared=shared, lora=lora, optimizer=optimizer, average_every=2)
    job, (client,) = await train(world, config)
    central = Central(world, config)
    data = batches("client-0", world.config.vocab_size)
    for step in range(1, 5):
        central.step(step, data(step - 1))
    close_to(client.weights, central.weights, TOLERANCE)
    assert set(await adapters(job)) == (set(client.weights) if shared == "A,B,C" else set())


async def test_recomputing_and_keeping_give_the_same_weights(world: World) -> None:
    plain = config_of(strategy="client-batch", clients=2)
    kept, _ = await train(world, plain)
    recomputed, _ = await train(world, plain.model_copy(update={"recompute": True}))
    one, other = await adapters(kept), await adapters(recomputed)
    assert all(torch.equal(one[name], other[name]) for name in one)


async def test_a_bfloat16_base_with_narrow_codecs_learns(world: World) -> None:
    config = config_of(
        strategy="server-hierarchical",
        clients=2,
        compute_dtype="bfloat16",
        codec="int8",
        gradient_codec="bf16",
        average_every=2,
        lora=LoraPart(r=4, dropout=0.1),
    )
    job, clients = await train(world, config)
    assert all(outcome.loss is not None for client in clients for outcome in client.outcomes)
    assert any(bool(tensor.abs().sum()) for name, tensor in (await adapters(job)).items() if "lora_B" in name)
