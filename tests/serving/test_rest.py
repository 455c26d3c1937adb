"""REST: shapes, errors, the weight slice with ranges, sessions and metrics."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from raw_edge import Floats, RawEdge, RawSession

from serving.app import create_app
from serving.core import Core
from serving.keys import KeyRing
from serving.session import Phase
from serving.settings import ServerSettings
from split_llama.wire.control import Hello
from split_llama.wire.frame import Frame, Kind, encode_message, split_message

BLOCKS = (1, 5)
WEIGHTS = "/v1/model/edge/files/model.safetensors"
PART = {"p": 1, "q": 1}


@pytest.fixture
async def client(place: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(place.core))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


async def test_what_is_served(client: httpx.AsyncClient, place: Any) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert models["data"][0]["id"] == "tiny"
    assert models["data"][0]["max_model_len"] == 256
    model = (await client.get("/v1/model")).json()
    assert model["blocks"] == [1, 5]
    assert model["allowed_partition"] == [1, 1]
    assert model["geometry"] == place.hosted.geometry
    assert model["config"]["model_type"] == "llama"
    assert model["codecs"] == ["fp32", "bf16", "fp16", "int8"]
    assert {"hidden_size", "num_hidden_layers", "dtype", "max_num_seqs", "max_frame_bytes", "page_size"} <= set(model)
    assert (await client.get("/version")).json()["protocol"] == 1


async def test_health_before_and_after(client: httpx.AsyncClient, place: Any, model_folder: Path) -> None:
    assert (await client.get("/readyz")).status_code == 200
    loading = Core(ServerSettings(model=str(model_folder)), KeyRing())
    transport = httpx.ASGITransport(create_app(loading))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as early:
        assert (await early.get("/readyz")).status_code == 503
        assert (await early.get("/healthz")).status_code == 200
        assert (await early.get("/metrics")).status_code == 200
        refused = await early.get("/v1/model")
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "ServerUnreachable"
    await place.core.drain()
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/health")).status_code == 200


async def test_the_slice_whole_and_in_ranges(client: httpx.AsyncClient) -> None:
    manifest = (await client.get("/v1/model/edge", params=PART)).json()
    files = {file["name"]: file for file in manifest["files"]}
    for name, file in files.items():
        response = await client.get(f"/v1/model/edge/files/{name}", params=PART)
        assert response.status_code == 200
        assert len(response.content) == file["size"] == int(response.headers["Content-Length"])
        assert hashlib.sha256(response.content).hexdigest() == file["sha256"]
        assert response.headers["ETag"] == f'"{file["sha256"]}"'
    body = (await client.get(WEIGHTS, params=PART)).content
    size, tag = len(body), f'"{files["model.safetensors"]["sha256"]}"'
    for value, expected in (("bytes=0-99", body[:100]), ("bytes=1000-", body[1000:]), ("bytes=-7", body[-7:])):
        response = await client.get(WEIGHTS, params=PART, headers={"Range": value, "If-Range": tag})
        assert response.status_code == 206
        assert response.content == expected
        start = body.index(expected)
        assert response.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{size}"
    for value in ("bytes=0-1,5-6", "bytes=9-3", "lines=1-2", "bytes=-"):
        response = await client.get(WEIGHTS, params=PART, headers={"Range": value})
        assert (response.status_code, len(response.content)) == (200, size)
    response = await client.get(WEIGHTS, params=PART, headers={"Range": "bytes=0-9", "If-Range": '"older"'})
    assert (response.status_code, len(response.content)) == (200, size)
    for value in (f"bytes={size}-", "bytes=-0"):
        response = await client.get(WEIGHTS, params=PART, headers={"Range": value})
        assert response.status_code == 416
        assert response.headers["Content-Range"] == f"bytes */{size}"
    assert (await client.get(WEIGHTS, params=PART, headers={"If-None-Match": tag})).status_code == 304
    head = await client.head(WEIGHTS, params=PART, headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (206, b"", "10")


@pytest.mark.parametrize(
    ("path", "status", "name"),
    [
        ("/v1/model/edge?p=0&q=1", 403, "PartitionNotAllowed"),
        ("/v1/model/edge?p=3&q=3", 403, "PartitionNotAllowed"),
        ("/v1/model/edge?p=-1&q=1", 400, "BadRequest"),
        ("/v1/model/edge?p=1", 400, "BadRequest"),
        (f"{WEIGHTS}?p=0&q=0", 403, "PartitionNotAllowed"),
        ("/v1/model/edge/files/passwd?p=1&q=1", 400, "BadRequest"),
        ("/v1/model/edge/files/..%2Fconfig.json?p=1&q=1", 404, "HTTPException"),
        ("/v1/nothing", 404, "HTTPException"),
        ("/v1/frames", 405, "HTTPException"),
    ],
)
async def test_errors_have_one_shape(client: httpx.AsyncClient, path: str, status: int, name: str) -> None:
    response = await client.get(path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == name
    assert set(response.json()["error"]) == {"code", "type", "message"}


async def test_posting_frames_is_checked(client: httpx.AsyncClient, place: Any) -> None:
    response = await client.post("/v1/frames", content=b"")
    assert response.json()["error"]["type"] == "BadRequest"
    named = {"X-FL-Connection": "0" * 32}
    response = await client.post("/v1/frames", content=bytes(place.hosted.max_message_bytes + 1), headers=named)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "FrameTooLarge")
    response = await client.post("/v1/frames", content=b"x" * 40, headers=named)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "BadFrame")
    assert (await client.post("/v1/frames", content=b"", headers=named)).status_code == 204


async def test_own_sessions(client: httpx.AsyncClient, place: Any, states: Floats) -> None:
    mine = await (await place.connect()).open(1, BLOCKS)
    other = await (await place.connect("bob")).open(1, BLOCKS)
    await mine.run(0, states[:20])
    (listed,) = (await client.get("/v1/sessions")).json()["data"]
    assert (listed["id"], listed["length"], listed["pages"]) == (mine.payload.session, 20, 2)
    assert (await client.get("/v1/key")).json()["sessions"] == 1
    refused = await client.delete(f"/v1/sessions/{other.payload.session}")
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "NotOwner")
    assert (await client.delete(f"/v1/sessions/{'0' * 32}")).status_code == 404
    assert (await client.delete(f"/v1/sessions/{mine.payload.session}")).status_code == 204
    assert (await client.get("/v1/sessions")).json()["data"] == []
    place.check_pages()


async def test_metrics_count_what_was_done(client: httpx.AsyncClient, place: Any, states: Floats) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:20])
    for position in range(20, 25):
        await session.run(position, states[position : position + 1])
    await session.edge.send(session.step(99, states[:1]))
    await session.edge.error(1)
    text = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["fl_llama_prompt_tokens_total"]) == 20
    assert float(values["fl_llama_generation_tokens_total"]) == 5
    assert float(values["fl_llama_steps_total"]) == 6
    assert float(values["fl_llama_sessions"]) == 1
    assert float(values["fl_llama_time_to_first_token_seconds_count"]) == 1
    assert float(values["fl_llama_inter_token_latency_seconds_count"]) == 5
    assert float(values["fl_llama_server_overhead_seconds_count"]) == 6
    assert float(values["fl_llama_batch_rows_sum"]) == 25
    assert float(values['fl_llama_refusals_total{error="PositionGap"}']) == 1
    assert float(values["fl_llama_kv_cache_usage_ratio"]) > 0
    for name in ("num_requests_running", "num_requests_waiting", "received_bytes_total", "model_pass_seconds_count"):
        assert f"fl_llama_{name}" in values
    assert session.payload.session not in text


async def test_a_post_waits_for_its_own_sessions_only(
    make_place: Any, states: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await make_place()
    transport = httpx.ASGITransport(create_app(place.core))
    stuck, free = (RawSession(RawEdge(None), handle, BLOCKS) for handle in (1, 2))  # type: ignore[arg-type]
    hello = Frame(Kind.HELLO, payload=Hello(protocol=1, client="test").to_bytes())
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

        async def post(*sent: Frame) -> tuple[list[tuple[Kind, int]], bool]:
            async with asyncio.timeout(20):
                answer = await client.post("/v1/frames", content=encode_message(sent), headers=named)
            kinds = [(frame.kind, frame.handle) for frame in split_message(answer.content)]
            return kinds, "X-FL-Pending" in answer.headers

        named = {"X-FL-Connection": "b" * 32}
        opened, pending = await post(hello, stuck.opening(Kind.OPEN), free.opening(Kind.OPEN))
        assert (opened, pending) == ([(Kind.HELLO, 0), (Kind.OPEN, 1), (Kind.OPEN, 2)], False)
        entry = next(entry for entry in place.core.registry if entry.handle == 1)
        # As it would be while digests are computed: its steps wait.
        entry.verified = False
        monkeypatch.setattr("serving.dataplane.POST_SECONDS", 0.01)
        assert await post(stuck.step(0, states[:3])) == ([], True)
        assert await post() == ([], True)
        monkeypatch.setattr("serving.dataplane.POST_SECONDS", 3600)
        assert await post(free.step(0, states[:3])) == ([(Kind.REPLY, 2)], True)
        entry.session.phase = Phase.WAITING
        # Waiting for room it holds up nothing, not even what was sent for it.
        assert await post(stuck.step(3, states[3:4]), free.step(3, states[3:4])) == ([(Kind.REPLY, 2)], True)
        entry.session.phase, entry.verified = Phase.ACTIVE, True
        asking = asyncio.create_task(post())
        await asyncio.sleep(0)
        place.core.worker.kick(entry)
        assert (await asking)[0][0] == (Kind.REPLY, 1)


async def test_a_posted_connection_lapses(make_place: Any, clock: Any) -> None:
    place = await make_place(clock=clock)
    transport = httpx.ASGITransport(create_app(place.core))
    opening = RawSession(RawEdge(None), 1, BLOCKS).opening(Kind.OPEN)  # type: ignore[arg-type]
    hello = Frame(Kind.HELLO, payload=Hello(protocol=1, client="test").to_bytes())
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        named = {"X-FL-Connection": "a" * 32}
        answer = await client.post("/v1/frames", content=encode_message([hello, opening]), headers=named)
        assert [frame.kind for frame in split_message(answer.content)] == [Kind.HELLO, Kind.OPEN]
        (entry,) = place.core.registry
        clock.now += 59
        place.core.sweep()
        assert entry.mailbox is not None
        clock.now += 2
        place.core.sweep()
        assert entry.mailbox is None
