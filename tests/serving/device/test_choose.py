"""`--attention`: what is chosen where, and what is refused before any weights are read."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_edge import Floats
from tiny_models import TinyModel

from serving import hosted
from serving.device import choose
from serving.device.choose import choose_attention
from serving.hosted import load_hosted
from serving.passes import HostPasses
from serving.settings import ServerSettings
from split_llama.config import ModelConfig
from split_llama.errors import UnsupportedModel, UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = ModelConfig.from_hf(TinyModel().config())
WIDE = dataclasses.replace(CONFIG, head_dim=512)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_cpu_computes_in_pytorch(compiled: None) -> None:
    assert choose_attention("auto", CONFIG, CPU, 16) == "torch"
    assert choose_attention("torch", WIDE, CPU, 16) == "torch"
    with pytest.raises(UsageError, match=r"need a CUDA device.*--attention torch"):
        choose_attention("triton", CONFIG, CPU, 16)


def test_a_gpu_takes_the_kernels(hopper: None) -> None:
    assert choose_attention("auto", CONFIG, CUDA, 16) == "triton"
    assert choose_attention("triton", CONFIG, CUDA, 16) == "triton"
    assert choose_attention("torch", CONFIG, CUDA, 16) == "torch"


@pytest.mark.parametrize(
    ("config", "page_size", "limit"),
    [
        (WIDE, 16, "head_dim 1 to 256, not 512"),
        (CONFIG, 24, "powers of two from 8 to 256, not 24"),
        (dataclasses.replace(CONFIG, num_attention_heads=256, num_key_value_heads=1), 16, "1 to 128 query heads"),
    ],
)
def test_what_the_kernels_do_not_serve_is_named(
    hopper: None, caplog: pytest.LogCaptureFixture, config: ModelConfig, page_size: int, limit: str
) -> None:
    with pytest.raises(UnsupportedModel, match=limit):
        choose_attention("triton", config, CUDA, page_size)
    with caplog.at_level(logging.WARNING, logger="fl_llama.device"):
        assert choose_attention("auto", config, CUDA, page_size) == "torch"
    assert limit in caplog.text


def test_an_old_device_computes_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_attention("auto", CONFIG, CUDA, 16) == "torch"
    with pytest.raises(UsageError, match=r"8\.0 or later, this device has 7\.5"):
        choose_attention("triton", CONFIG, CUDA, 16)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert choose_attention("auto", CONFIG, CUDA, 16) == "torch"
    with pytest.raises(UsageError, match="pip install triton"):
        choose_attention("triton", CONFIG, CUDA, 16)


def test_another_package_of_that_name_is_refused(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UsageError("the package kernels is another one")

    monkeypatch.setattr(choose, "check_kernels_package", refuse)
    for wanted in ("auto", "triton"):
        with pytest.raises(UsageError, match="another one"):
            choose_attention(wanted, CONFIG, CUDA, 16)
    assert choose_attention("torch", CONFIG, CUDA, 16) == "torch"


def test_a_model_is_refused_before_its_weights_are_read(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(hosted, "load_packed_segment", read)
    folder = models(head_dim=512)
    with pytest.raises(UnsupportedModel, match="head_dim 1 to 256, not 512"):
        load_hosted(ServerSettings(model=str(folder), device="cpu", attention="triton"), folder)


def test_the_default_is_unchanged_on_a_cpu(models: Callable[..., Path]) -> None:
    folder = models()
    assert isinstance(load_hosted(ServerSettings(model=str(folder), device="cpu"), folder).passes, HostPasses)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: unused pages may hold infinities
async def test_a_server_over_the_kernels_answers_steps(
    make_place: Callable[..., Awaitable[Any]],
    whole: Callable[..., Floats],
    states: Floats,
    use_references: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serving.device.passes import DevicePasses

    use_references()
    monkeypatch.setattr(choose, "WARM_UP_SECONDS", 0.0)
    place = await make_place(attention="triton")
    assert isinstance(place.hosted.passes, DevicePasses)
    edge = await place.connect()
    one, other = await edge.open(1, (1, 5)), await edge.open(2, (2, 4))
    want, want_other = whole(states[:23]), whole(states[:12], blocks=(2, 4))
    for first, end in ((0, 20), (20, 21), (21, 22), (22, 23)):
        np.testing.assert_allclose(await one.run(first, states[first:end]), want[first:end], rtol=1e-4, atol=1e-4)
    await edge.send(one.step(20, states[20:22]), other.step(0, states[:12]))
    replies = {frame.handle: frame for frame in [await edge.next(), await edge.next()]}
    np.testing.assert_allclose(one.rows(replies[1]), want[20:22], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other.rows(replies[2]), want_other, rtol=1e-4, atol=1e-4)
    place.check_pages()
