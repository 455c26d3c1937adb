"""Where an edge's adapter comes from, what does not fit, and what the noise and the pins make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from peft_oracle import greedy, load_peft, write_random_adapter

from edge_client.api.model import SplitModelForCausalLM
from edge_client.model_source import ModelSource
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import AdapterChoice, EdgeSettings
from edge_client.threads import in_thread
from split_llama.config import BlockRange
from split_llama.errors import AdapterMismatch, CheckpointError, FlLlamaError, PinMismatch, UsageError
from split_llama.lora import Adapter, LoraConfig, read_adapter, write_adapter
from tests.edge_client.conftest import MakeSettings, ServeModel

PROMPT = [1, 9, 77, 4, 200, 31, 5]


async def answer(settings: EdgeSettings, count: int = 20) -> list[int]:
    async with EdgeRuntime.connect(settings) as edge:
        params = edge.params(max_new_tokens=count, ignore_eos=True, temperature=0.0, repetition_penalty=1.0)
        async with edge.open() as session:
            turn = edge.turn(PROMPT, params)
            async for _ in session.generate(PROMPT, turn):
                pass
        return turn.tokens


async def find(settings: EdgeSettings) -> ModelSource:
    return await in_thread(lambda: prepare(settings))


def split(folder: Path, inner: BlockRange) -> tuple[Path, Path]:
    """Two folders: the adapter's blocks `inner`, and the others."""
    whole = read_adapter(folder)
    middle = whole.part(inner)
    outer = {name: tensor for name, tensor in whole.tensors.items() if name not in middle.tensors}
    write_adapter(folder.with_name("middle"), middle, "base")
    write_adapter(folder.with_name("outer"), Adapter(whole.lora, outer), "base")
    return folder.with_name("middle"), folder.with_name("outer")


async def test_outer_parts_may_be_private(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    base = tiny_checkpoint()
    whole = write_random_adapter(tmp_path / "whole", base)
    middle, outer = split(whole, BlockRange(1, 3))
    want = greedy(load_peft(base, whole), PROMPT, 20)
    foreign = write_random_adapter(tmp_path / "foreign", tiny_checkpoint(hidden=64))
    cases: list[tuple[dict[str, str], type[FlLlamaError], str]] = [
        ({"adapter": "tuned"}, AdapterMismatch, r"private.*--adapter NAME=DIR.*nothing was sent"),
        ({"partition": "2,1"}, AdapterMismatch, "block 1 runs here under partition 2,1"),
        ({"adapter": f"tuned={foreign}"}, AdapterMismatch, "shape"),
        ({"adapter": f"tuned={base}"}, CheckpointError, r"adapter_config\.json"),
        ({"adapter": "mine"}, UsageError, "no adapter 'mine'; it has tuned"),
    ]
    async with serve_model(base, lora_modules=(f"tuned={middle}",)) as url:
        assert await answer(edge_settings(url, adapter=f"tuned={outer}")) == want
        assert await answer(edge_settings(url, adapter=f"tuned={whole}")) == want
        for changes, error, match in cases:
            with pytest.raises(error, match=match):
                await find(edge_settings(url, **({"adapter": f"tuned={outer}"} | changes)))
        with pytest.raises(AdapterMismatch, match="block 0 runs on the server under partition 0,1"):
            await find(edge_settings(url, adapter=f"tuned={outer}", partition="0,1", allow_embedding_states=True))
    async with serve_model(base) as url:
        with pytest.raises(UsageError, match="no adapter 'tuned'; it has none"):
            await find(edge_settings(url, adapter="tuned"))


async def test_the_part_from_the_server_is_pinned(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    serve_model: ServeModel,
    edge_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_checkpoint()
    folders = [write_random_adapter(tmp_path / f"seed{seed}", base, seed=seed) for seed in (1, 2)]
    digests = []
    for folder in folders:
        async with serve_model(base, lora_modules=(f"tuned={folder}",)) as url:
            # The address is another one in each round: what the edge knows of the first goes for the second.
            pins = tmp_path / "state" / "pins.json"
            if digests:
                known = json.loads(pins.read_text())
                pins.write_text(json.dumps({url: next(iter(known.values()))}))
                with pytest.raises(PinMismatch, match=r"another adapter 'tuned'.*nothing was sent"):
                    await find(edge_settings(url, adapter="tuned"))
                await find(edge_settings(url))
            source = await find(edge_settings(url, adapter="tuned", accept_new_weights=bool(digests)))
            assert source.adapter is not None
            digests.append(source.adapter.own.digest())
            assert source.adapter.own.blocks == (0, 3)
            await find(edge_settings(url, adapter="tuned"))
    assert digests[0] != digests[1]


async def test_noise_belongs_to_what_a_has_of_the_adapter(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    base = tiny_checkpoint()
    whole = read_adapter(write_random_adapter(tmp_path / "one", base))
    write_random_adapter(tmp_path / "two", base, seed=5)
    # The same A; another C.
    changed = {name: tensor * (2 if ".3." in name else 1) for name, tensor in whole.tensors.items()}
    write_adapter(tmp_path / "three", Adapter(whole.lora, changed), "base")
    modules = tuple(f"{name}={tmp_path / name}" for name in ("one", "two", "three"))
    sent: dict[str | None, torch.Tensor] = {}
    async with serve_model(base, lora_modules=modules) as url:
        for name in (None, "one", "two", "three"):
            async with EdgeRuntime.connect(edge_settings(url, noise="0.1", adapter=name)) as edge:
                session = edge.model.open(64)
                assert session.noise is not None
                session.noise.append(PROMPT)
                sent[name] = torch.as_tensor(session.noise.unit_rows(session.noise.digests(0)))
    assert torch.equal(sent["one"], sent["three"])
    assert not torch.equal(sent["one"], sent["two"])
    assert not torch.equal(sent["one"], sent[None])
    # Each has a clip norm of its own, calibrated over its own states.
    assert len(list((tmp_path / "cache" / "clip").iterdir())) == 3


async def test_a_b_without_any_weights_for_the_edge(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    """An adapter of inner blocks alone: whoever has its folder says so by naming it."""
    base = tiny_checkpoint()
    middle, _ = split(write_random_adapter(tmp_path / "whole", base), BlockRange(1, 3))
    want = greedy(load_peft(base, middle), PROMPT, 20)
    async with serve_model(base, lora_modules=(f"tuned={middle}",)) as url:
        assert await answer(edge_settings(url, adapter=f"tuned={middle}")) == want
        everything = edge_settings(url, adapter="tuned", partition="0,0", allow_embedding_states=True)
        assert await answer(everything) == want


async def test_the_python_api_takes_an_adapter(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    serve_model: ServeModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_checkpoint()
    folder = write_random_adapter(tmp_path / "adapter", base)
    want = greedy(load_peft(base, folder), PROMPT, 12)
    places: dict[str, Any] = {"cache_dir": tmp_path / "cache", "state_dir": tmp_path / "state"}

    def generate(url: str) -> list[int]:
        given = {"noise": "0", "codec": "fp32", "adapter": "tuned", "threads": 1, **places}
        with SplitModelForCausalLM.from_server(url, **given) as model:
            ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert isinstance(ids, torch.Tensor)
        return [int(token) for token in ids[0, len(PROMPT) :]]

    async with serve_model(base, lora_modules=(f"tuned={folder}",)) as url:
        assert await in_thread(lambda: generate(url)) == want


@pytest.mark.parametrize("text", ["", "=folder", "name="])
def test_what_names_no_adapter_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME=DIR"):
        AdapterChoice.parse(text)


def test_a_choice_is_a_name_and_perhaps_a_folder() -> None:
    assert AdapterChoice.parse("tuned") == AdapterChoice("tuned", None)
    assert AdapterChoice.parse("tuned=a=b") == AdapterChoice("tuned", Path("a=b"))
    assert [str(AdapterChoice.parse(text)) for text in ("tuned", "tuned=a=b")] == ["tuned", "tuned=a=b"]
    assert LoraConfig(4, 8).scaling == 2
