"""Callers with different keys find nothing of each other's prompts: not by name, and not by how much was cached."""

from __future__ import annotations

import json
from typing import Any

from websockets.asyncio.client import connect

from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import Gateway, StartGateway

IDS = list(range(3, 43))
WORDS = [{"role": "user", "content": "dabada kilo and bagafan remedo " * 3}]


async def cached(gateway: Gateway, key: str | None, **body: Any) -> int:
    """Complete IDS; give how much of it the gateway says was there."""
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    async with gateway.http(headers=headers) as http:
        usual = {"prompt": IDS, "max_tokens": 2, "ignore_eos": True}
        reply = await http.post("/v1/completions", json=usual | body)
        assert reply.status_code == 200, reply.text
        found: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


async def cached_in_chat(gateway: Gateway, key: str) -> int:
    url = gateway.url.replace("http:", "ws:") + "/v1/chat/ws"
    async with connect(url, additional_headers={"Authorization": f"Bearer {key}"}, proxy=None) as client:
        await client.send(json.dumps({"type": "send", "id": "a", "messages": WORDS, "max_tokens": 2}))
        found = 0
        async for text in client:
            reply = json.loads(text)
            assert reply["type"] != "error", reply
            if reply["type"] == "usage":
                found = reply["cached_tokens"]
            if reply["type"] == "done":
                break
        return found


async def chat(gateway: Gateway, key: str) -> int:
    async with gateway.http(headers={"Authorization": f"Bearer {key}"}) as http:
        reply = await http.post("/v1/chat/completions", json={"messages": WORDS, "max_tokens": 2})
        found: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


async def test_two_keys_never_share_a_cache_and_one_does(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway, tmp_path: Any
) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    async with start_gateway(tiny_checkpoint(), gateway_key_file=tmp_path / "keys") as gateway:
        most = len(IDS) - 1
        assert await cached(gateway, "one") == 0
        assert await cached(gateway, "two") == 0, "the other's prompt"
        assert await cached(gateway, "one") == most
        assert await cached(gateway, "two") == most, "its own by now"
        other = [*IDS[:20], 200, 201]
        assert await cached(gateway, "one", prompt=other, n=2) == 20
        longer = [*other, 202]
        assert await cached(gateway, "two", prompt=longer, n=2) == 20, "of its own, not what one has branched"
        assert await cached(gateway, "one", prompt=longer) == len(other) - 1


async def test_the_chat_socket_and_rest_have_one_owner_for_one_key(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway, tmp_path: Any
) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    async with start_gateway(tiny_checkpoint(), gateway_key_file=tmp_path / "keys") as gateway:
        assert await cached_in_chat(gateway, "one") == 0
        assert await cached_in_chat(gateway, "two") == 0
        held = await cached_in_chat(gateway, "one")
        assert held > 20
        assert await chat(gateway, "one") == held
    async with start_gateway(tiny_checkpoint(), gateway_key_file=tmp_path / "keys") as gateway:
        assert await chat(gateway, "one") == 0
        assert await cached_in_chat(gateway, "two") == 0
        assert await cached_in_chat(gateway, "one") == held


async def test_without_keys_all_callers_are_one(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway:
        assert await cached(gateway, None) == 0
        assert await cached(gateway, "whatever") == len(IDS) - 1
