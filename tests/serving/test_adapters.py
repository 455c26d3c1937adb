"""Adapters that a server holds: loaded and checked at start, asked for by name, listed, and handed to edges."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft_oracle import random_peft, write_random_adapter
from raw_edge import Floats, RawSession
from tiny_models import TinyModel, write_model

from serving.adapters import parse_lora_modules
from serving.app import create_app
from serving.hosted import load_hosted
from serving.settings import SECTION, ServerSettings
from split_llama.config import BlockRange
from split_llama.errors import (
    AdapterMismatch,
    BadRequest,
    CheckpointError,
    FlLlamaError,
    ModelMismatch,
    UsageError,
    error_for_code,
)
from split_llama.lora import parse_adapter, read_adapter, write_adapter
from split_llama.settings import add_flags, load_settings
from split_llama.wire.control import error_from_frame
from split_llama.wire.frame import Kind

BLOCKS = (1, 5)


@pytest.fixture(scope="session")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        "polite": write_random_adapter(home / "polite", model_folder, seed=1),
        "rude": write_random_adapter(home / "rude", model_folder, seed=2, r=2, target_modules=["up_proj", "q_proj"]),
    }


@pytest.fixture
async def place(make_place: Any, folders: dict[str, Path]) -> Any:
    return await make_place(lora_modules=tuple(f"{name}={folder}" for name, folder in folders.items()))


@pytest.fixture(scope="session")
def adapted(model_folder: Path) -> Callable[[int, Floats], Floats]:
    """What transformers with PEFT makes of rows in blocks 1 to 4, for the adapters' seeds."""

    def run(seed: int, rows: Floats) -> Floats:
        more: dict[str, Any] = {"r": 2, "target_modules": ["up_proj", "q_proj"]} if seed == 2 else {}
        model = random_peft(model_folder, seed=seed, **more).base_model.model.model
        x, positions = torch.from_numpy(rows)[None], torch.arange(len(rows))[None]
        masked = torch.full((len(rows), len(rows)), float("-inf")).triu(1)[None, None]
        angles = model.rotary_emb(x, positions)
        with torch.inference_mode():
            for layer in model.layers[1:5]:
                x = layer(x, attention_mask=masked, position_ids=positions, position_embeddings=angles)
        found: Floats = x[0].numpy()
        return found

    return run


def close(got: Floats, want: Floats) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


async def test_sessions_with_two_adapters_and_none_in_one_pass(
    place: Any, states: Floats, whole: Callable[..., Floats], adapted: Callable[[int, Floats], Floats]
) -> None:
    edge = await place.connect()
    names = ("polite", None, "rude")
    sessions = [await edge.open(handle, BLOCKS, adapter=name) for handle, name in enumerate(names, 1)]
    rows = states[:6]
    wants = [adapted(1, rows), whole(rows), adapted(2, rows)]
    assert np.abs(wants[0] - wants[1]).max() > 0.1
    assert np.abs(wants[2] - wants[1]).max() > 0.1
    for first, stop in ((0, 4), (4, 5), (5, 6)):
        # One message: the three steps wait together, and the next pass takes all of them.
        await edge.send(*(session.step(first, rows[first:stop]) for session in sessions))
        replies = [await edge.expect(Kind.REPLY) for _ in sessions]
        for session, reply in zip(sessions, sorted(replies, key=lambda frame: frame.handle), strict=True):
            session.ack = reply.seq
            close(session.rows(reply), wants[session.handle - 1][first:stop])
    shared = place.core.metrics.registry.get_sample_value("fl_llama_batch_sequences_sum")
    passes = place.core.metrics.registry.get_sample_value("fl_llama_batch_sequences_count")
    assert (shared, passes) == (9, 3), "each pass had all three"


async def test_forks_and_sessions_made_anew_keep_their_adapter(
    place: Any, states: Floats, adapted: Callable[[int, Floats], Floats]
) -> None:
    edge = await place.connect()
    parent = await edge.open(1, BLOCKS, adapter="polite")
    want = adapted(1, states[:6])
    close(await parent.run(0, states[:5]), want[:5])
    child = await parent.fork(2, 5)
    close(await child.run(5, states[5:6]), want[5:])
    # The server has lost the session: ATTACH names the adapter, and the rows come once more.
    place.core.remove(next(entry for entry in place.core.registry if entry.ident == parent.payload.session))
    answer = await parent.attach(await place.connect(), 3)
    assert (answer.kind, answer.first) == (Kind.RESYNC, 0)
    await parent.edge.send(answer)
    parent.seq = parent.ack = answer.seq
    close(await parent.run(0, states[:6]), want)


async def test_an_unknown_adapter_is_refused_and_the_known_ones_named(place: Any, make_place: Any) -> None:
    edge = await place.connect()
    await edge.send(RawSession(edge, 1, BLOCKS, adapter="kind").opening(Kind.OPEN))
    with pytest.raises(BadRequest, match=r"no adapter 'kind'; it holds polite, rude"):
        raise await edge.error(handle=1, seq=0)
    bare = await (await make_place()).connect()
    await bare.send(RawSession(bare, 1, BLOCKS, adapter="kind").opening(Kind.OPEN))
    with pytest.raises(BadRequest, match=r"no adapter 'kind'; it holds none"):
        raise await bare.error(handle=1, seq=0)
    assert len(place.core.registry) == 0


@pytest.mark.parametrize("other", [None, "rude"])
async def test_attach_must_name_the_adapter_it_was_opened_with(place: Any, other: str | None) -> None:
    session = await (await place.connect()).open(1, BLOCKS, adapter="polite")
    session.payload = session.payload.model_copy(update={"adapter": other})
    answer = await session.attach(await place.connect())
    with pytest.raises(ModelMismatch, match="opened with polite"):
        raise error_from_frame(answer)


async def test_rest_lists_them_and_gives_edges_their_part(place: Any, folders: dict[str, Path]) -> None:
    transport = httpx.ASGITransport(create_app(place.core))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        models = (await client.get("/v1/models")).json()["data"]
        model = (await client.get("/v1/model")).json()
        part = await client.get("/v1/adapters/polite/edge", params={"p": 2, "q": 1})
        unknown = await client.get("/v1/adapters/kind/edge", params={"p": 1, "q": 1})
        outside = await client.get("/v1/adapters/polite/edge", params={"p": 0, "q": 1})
        await (await place.connect()).open(1, BLOCKS, adapter="rude")
        sessions = (await client.get("/v1/sessions")).json()["data"]
    assert [(entry["id"], entry["parent"]) for entry in models] == [
        ("tiny", None),
        ("polite", "tiny"),
        ("rude", "tiny"),
    ]
    assert model["adapters"][1] == {
        "name": "rude",
        "r": 2,
        "alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "blocks": [0, 1, 2, 3, 4, 5],
    }
    whole = read_adapter(folders["polite"])
    found = parse_adapter(part.content, "the server")
    assert found.lora == whole.lora
    assert found.blocks == (0, 1, 5)
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())
    for refused, word in ((unknown, "it holds polite, rude"), (outside, "p >= 1")):
        assert refused.status_code in (400, 403)
        error = refused.json()["error"]
        assert word in error["message"]
        assert error_for_code(error["code"], "").status == refused.status_code
    assert [entry["adapter"] for entry in sessions] == ["rude"]


@pytest.mark.parametrize("text", ["polite", "=x", "polite=", "a b=x", "../a=x", "-a=x"])
def test_a_module_is_a_name_and_a_folder(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=DIR"):
        parse_lora_modules([text])


def test_what_cannot_be_served_is_said_at_start(model_folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    wider = write_model(tmp_path / "wider", TinyModel(layers=6, hidden=64))
    deeper = write_model(tmp_path / "deeper", TinyModel(layers=8))
    outer = tmp_path / "outer"
    write_adapter(outer, read_adapter(folders["polite"]).part(BlockRange(0, 1)), "base")
    cases: list[tuple[list[str], type[FlLlamaError], str]] = [
        ([f"a={write_random_adapter(tmp_path / 'w', wider)}"], AdapterMismatch, r"--lora-modules a=.*shape"),
        ([f"a={write_random_adapter(tmp_path / 'd', deeper)}"], AdapterMismatch, r"6 blocks.*another model"),
        ([f"a={write_random_adapter(tmp_path / 'x', model_folder, use_dora=True)}"], AdapterMismatch, "use_dora"),
        ([f"a={outer}"], AdapterMismatch, r"blocks 0 only.*\[1, 5\)"),
        ([f"a={model_folder}"], CheckpointError, r"adapter_config\.json"),
        ([f"a={folders['polite']}", f"a={folders['rude']}"], UsageError, "twice"),
        ([f"tiny={folders['polite']}"], UsageError, "name of the model itself"),
    ]
    for modules, error, match in cases:
        settings = ServerSettings(model=str(model_folder), device="cpu", lora_modules=tuple(modules))
        with pytest.raises(error, match=match):
            load_hosted(settings, model_folder)


def test_the_flag_may_be_given_several_times() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ServerSettings)
    flags = parser.parse_args(["--lora-modules", "a=one", "--lora-modules", "b=two"])
    for environ, given in (({}, vars(flags)), ({"FL_LLAMA_SERVER_LORA_MODULES": "a=one,b=two"}, {})):
        settings = load_settings(ServerSettings, SECTION, given, environ=environ).settings
        assert parse_lora_modules(settings.lora_modules) == {"a": Path("one"), "b": Path("two")}
