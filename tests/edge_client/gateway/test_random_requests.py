"""Requests put together by chance: an answer or a proper refusal, never a fault, and nothing left running."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway

CALL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "boolean"}}}}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
BOTH: dict[str, list[Any]] = {
    "max_tokens": [1, 2, 30],
    "temperature": [0, 0.3, 1, 2, 50, 1e-7],
    "top_p": [1, 0.5, 1e-9],
    "top_k": [-1, 0, 1, 5, 100_000],
    "min_p": [0, 0.5, 1],
    "n": [1, 2],
    "seed": [0, 5, -1, 2**62],
    "stop": ["a", ["b", "c"], []],
    "logit_bias": [{}, {"5": 100}, {"5": -100, "400": 3}, {"2": 100}],
    "frequency_penalty": [0, 2, -2],
    "presence_penalty": [0, 2, -2],
    "repetition_penalty": [1, 0.01, 100],
    "ignore_eos": [True, False],
    "stop_token_ids": [[5, 6], [99_999]],
    "stream": [True, False],
}
CHAT: dict[str, list[Any]] = {
    **BOTH,
    "messages": [[{"role": "system", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": ""}]],
    "max_completion_tokens": [1, 40],
    "logprobs": [True],
    "top_logprobs": [0, 2],
    "response_format": [
        {"type": "json_object"},
        {"type": "text"},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"schema": {}}},
    ],
    "tools": [[{"type": "function", "function": {"name": "f"}}], [CALL]],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}],
    "parallel_tool_calls": [True, False],
    "chat_template_kwargs": [{}, {"a": 1}],
}
COMPLETIONS: dict[str, list[Any]] = {
    **BOTH,
    "prompt": ["da", "", ["a", "b"], [1, 5], [[1, 5], [7]]],
    "logprobs": [0, 1, 5],
    "echo": [True, False],
    "add_special_tokens": [True, False],
}
ODD: list[Any] = [None, True, 0, -1, 1.5, 1e308, 10**30, "", "auto", [], ["a"], [1], {}, {"type": "json_object"}, [[]]]


async def test_no_request_is_a_fault(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    draw = random.Random(7)

    def body(fields: dict[str, list[Any]], usual: dict[str, Any]) -> dict[str, Any]:
        named = draw.sample(sorted(fields), draw.randint(1, 6))
        odd = draw.random() < 0.15
        chosen = {name: draw.choice(ODD if odd and name == named[0] else fields[name]) for name in named}
        return {"max_tokens": 5, **usual, **chosen}

    async with start_gateway(tiny_checkpoint(max_positions=2048), max_concurrent=4) as gateway, gateway.http() as http:
        paths = ("/v1/chat/completions", "/v1/completions")
        bodies = [
            (paths[0], body(CHAT, {"messages": [{"role": "user", "content": "da"}]}))
            if draw.random() < 0.5
            else (paths[1], body(COMPLETIONS, {"prompt": "da"}))
            for _ in range(240)
        ]
        answered = 0

        async def send(part: list[tuple[str, dict[str, Any]]]) -> None:
            nonlocal answered
            for path, asked in part:
                reply = await http.post(path, json=asked)
                assert reply.status_code in (200, 400), (asked, reply.text)
                is_stream = reply.headers["content-type"].startswith("text/event-stream")
                assert is_stream or ("error" in reply.json()) == (reply.status_code == 400)
                assert not is_stream or ('"error"' not in reply.text and reply.text.endswith("data: [DONE]\n\n"))
                answered += reply.status_code == 200

        await asyncio.gather(*(send(bodies[start::4]) for start in range(4)))
        assert answered > 120, "most of them are good requests"
        assert gateway.service.places.running == gateway.service.places.waiting == 0
        assert json.loads((await http.get("/health")).text) == {"status": "ok"}
