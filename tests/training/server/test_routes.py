"""Jobs over REST: what is shown, to whom, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from split_llama.errors import FlLlamaError
from split_llama.lora import parse_adapter
from tests.training.server.world import World, adapters, config_of, same, until
from training.server.extension import MAX_LIVE_JOBS_OF_ONE

CREATOR = {"Authorization": "Bearer alice"}
OTHER = {"Authorization": "Bearer bob"}
NOBODY = {"Authorization": "Bearer anonymous"}


@pytest.fixture
async def rest(world: World) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(world.extension.router())

    @app.exception_handler(FlLlamaError)
    async def refused(request: Request, error: FlLlamaError) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__, "message": error.message}, status_code=error.status)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return dict(config_of(strategy="client-batch", **fields).model_dump(mode="json"))


async def test_a_job_from_its_creation_to_its_adapters(world: World, rest: httpx.AsyncClient) -> None:
    answer = await rest.post("/v1/jobs", json=body(clients=1, steps=300), headers=CREATOR)
    assert answer.status_code == 200
    made = answer.json()
    assert made["key"].startswith("flj-")
    assert (made["state"], made["step"], made["steps"], made["generation"]) == ("waiting", 0, 300, 0)
    path = f"/v1/jobs/{made['id']}"
    client = world.client("one", world.extension.find(made["id"]), made["key"]).start()
    await until(lambda: len(client.outcomes) > 3)
    paused = (await rest.post(f"{path}/pause", headers=CREATOR)).json()
    assert paused["state"] == "paused"
    shown = (await rest.get(path, headers=CREATOR)).json()
    assert "key" not in shown
    assert shown["config"] == made["config"]
    assert shown["loss"] > 0
    assert shown["tokens"] > 0
    assert shown["checkpoint_error"] is None
    (member,) = shown["members"]
    assert member["name"] == "one"
    assert member["present"]
    assert member["samples"] > 0
    assert (member["left_out"], member["clipped"], member["skipped"]) == (0, 0, 0)
    assert (await rest.post(f"{path}/resume", headers=CREATOR)).json()["state"] == "running"
    listed = (await rest.get("/v1/jobs", headers=CREATOR)).json()
    assert [(job["id"], job["state"]) for job in listed["data"]] == [(made["id"], "running")]
    cancelled = await rest.delete(path, headers=CREATOR)
    assert cancelled.json()["state"] == "cancelled"
    assert await client.ended() == "cancelled"
    fetched = await rest.get(f"{path}/adapter", headers=CREATOR)
    adapter = parse_adapter(fetched.content, "the answer")
    same(adapter.tensors, await adapters(world.extension.find(made["id"])))
    assert adapter.lora.r == 4
    assert (await rest.post(f"{path}/resume", headers=CREATOR)).json()["error"] == "JobEnded"
    gauges = {name: read() for name, read in world.host.gauges.items()}
    assert gauges["training_jobs_cancelled"] == 1
    assert gauges["training_held_bytes"] == gauges["training_activation_bytes"] == 0
    assert world.host.counts["training_steps"] >= 4
    assert world.host.counts["training_tokens"] >= shown["tokens"]


async def test_a_job_is_opened_by_its_creator_or_its_key_alone(rest: httpx.AsyncClient) -> None:
    made = (await rest.post("/v1/jobs", json=body(), headers=CREATOR)).json()
    other = (await rest.post("/v1/jobs", json=body(), headers=OTHER)).json()
    for method, path in (("GET", ""), ("POST", "/pause"), ("POST", "/resume"), ("DELETE", ""), ("GET", "/adapter")):
        where = f"/v1/jobs/{made['id']}{path}"
        for headers in (OTHER, OTHER | {"X-FL-Job-Key": other["key"]}, CREATOR | {"X-FL-Job-Key": other["key"]}):
            refused = await rest.request(method, where, headers=headers)
            assert (refused.status_code, refused.json()["error"]) == (403, "NotOwner"), (method, path)
        assert (await rest.request(method, where)).json()["error"] == "Unauthenticated"
        assert (await rest.request(method, f"/v1/jobs/job-none{path}", headers=CREATOR)).status_code == 404
    opened = await rest.get(f"/v1/jobs/{made['id']}", headers=OTHER | {"X-FL-Job-Key": made["key"]})
    assert opened.json()["id"] == made["id"]
    assert [job["id"] for job in (await rest.get("/v1/jobs", headers=OTHER)).json()["data"]] == [other["id"]]


async def test_without_api_keys_the_jobs_key_is_needed(rest: httpx.AsyncClient) -> None:
    made = (await rest.post("/v1/jobs", json=body(), headers=NOBODY)).json()
    assert (await rest.get(f"/v1/jobs/{made['id']}", headers=NOBODY)).json()["error"] == "NotOwner"
    opened = await rest.get(f"/v1/jobs/{made['id']}", headers=NOBODY | {"X-FL-Job-Key": made["key"]})
    assert opened.status_code == 200


async def test_keys_and_secrets_are_nowhere_on_the_disk(world: World, rest: httpx.AsyncClient) -> None:
    made = (await rest.post("/v1/jobs", json=body(clients=1, steps=2), headers=CREATOR)).json()
    client = world.client("one", world.extension.find(made["id"]), made["key"]).start()
    assert await client.ended() == "done"
    await world.extension.close()
    text = (world.files / made["id"] / "job.json").read_text()
    assert made["key"] not in text
    assert b"one".hex().ljust(64, "0") not in text


async def test_a_wrong_configuration_names_the_field(rest: httpx.AsyncClient) -> None:
    answer = await rest.post("/v1/jobs", json={"stepps": 3}, headers=CREATOR)
    assert answer.status_code == 400
    assert "'steps'" in answer.json()["message"] or "steps" in answer.json()["message"]
    assert (await rest.post("/v1/jobs", json=[], headers=CREATOR)).status_code == 422


async def test_code_that_a_client_names_runs_only_where_the_operator_allows_it(
    world: World, rest: httpx.AsyncClient
) -> None:
    named = "tests.training.server.own_strategy:Everybody"
    job = body(clients=1) | {"strategy": named}
    refused = await rest.post("/v1/jobs", json=job, headers=CREATOR)
    assert refused.status_code == 400
    assert f"--extension-plugin {named}" in refused.json()["message"]
    world.host.plugins = (named,)
    assert (await rest.post("/v1/jobs", json=job, headers=CREATOR)).status_code == 200


async def test_a_member_sees_a_job_and_its_creator_alone_changes_it(rest: httpx.AsyncClient) -> None:
    made = (await rest.post("/v1/jobs", json=body(), headers=CREATOR)).json()
    path, member = f"/v1/jobs/{made['id']}", OTHER | {"X-FL-Job-Key": made["key"]}
    assert (await rest.get(path, headers=member)).status_code == 200
    assert (await rest.get(f"{path}/adapter", headers=member)).status_code == 200
    for method, change in (("POST", "/pause"), ("POST", "/resume"), ("DELETE", "")):
        refused = await rest.request(method, path + change, headers=member)
        assert (refused.status_code, refused.json()["error"]) == (403, "NotOwner"), change
        assert (await rest.request(method, path + change, headers=CREATOR)).status_code == 200


async def test_without_api_keys_the_jobs_key_changes_it(rest: httpx.AsyncClient) -> None:
    made = (await rest.post("/v1/jobs", json=body(), headers=NOBODY)).json()
    path, headers = f"/v1/jobs/{made['id']}", NOBODY | {"X-FL-Job-Key": made["key"]}
    assert (await rest.post(f"{path}/pause", headers=headers)).json()["state"] == "paused"
    assert (await rest.delete(path, headers=NOBODY)).json()["error"] == "NotOwner"
    assert (await rest.delete(path, headers=headers)).json()["state"] == "cancelled"


async def test_a_job_that_has_ended_can_be_removed_with_all_its_files(world: World, rest: httpx.AsyncClient) -> None:
    made = (await rest.post("/v1/jobs", json=body(clients=1, steps=1000), headers=CREATOR)).json()
    path, job = f"/v1/jobs/{made['id']}", world.extension.find(made["id"])
    client = world.client("one", job, made["key"]).start()
    await until(lambda: job.record.step >= 2)
    first = (await rest.delete(path, headers=CREATOR)).json()
    assert (first["state"], first["removed"]) == ("cancelled", False)
    # Right behind it: what the job still writes is waited for.
    second = (await rest.delete(path, headers=CREATOR)).json()
    assert second["removed"]
    assert await client.ended() == "cancelled"
    assert not (world.files / made["id"]).exists()
    assert (await rest.get(path, headers=CREATOR)).json()["error"] == "UnknownJob"
    assert (await rest.get("/v1/jobs", headers=CREATOR)).json()["data"] == []
    await world.restart()
    assert world.extension.jobs == []


async def test_one_owner_cannot_take_all_places(rest: httpx.AsyncClient) -> None:
    for _ in range(MAX_LIVE_JOBS_OF_ONE):
        made = (await rest.post("/v1/jobs", json=body(), headers=CREATOR)).json()
    refused = await rest.post("/v1/jobs", json=body(), headers=CREATOR)
    assert (refused.status_code, refused.json()["error"]) == (429, "LimitExceeded")
    assert (await rest.post("/v1/jobs", json=body(), headers=OTHER)).status_code == 200
    await rest.delete(f"/v1/jobs/{made['id']}", headers=CREATOR)
    assert (await rest.post("/v1/jobs", json=body(), headers=CREATOR)).status_code == 200
