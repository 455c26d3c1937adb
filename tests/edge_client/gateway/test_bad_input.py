"""What people send by mistake or in bad faith: always OpenAI's error shape, never a trace of it left behind."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "dabada"}]
GET = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


def check_shape(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    usual = {"messages": HELLO} if path == CHAT else {"prompt": "dabada"}
    return await http.post(path, content=json.dumps({"max_tokens": 2, **usual, **body}), headers=JSON)


# path, changed fields, the error's param, a part of its message
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, "messages", "list"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
    (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role", "'system'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, None, "no valid text"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    (CHAT, {"max_tokens": -1}, "max_tokens", "greater"),
    (CHAT, {"max_tokens": 2**40}, "max_tokens", "less"),
    (CHAT, {"max_tokens": "five"}, "max_tokens", "integer"),
    (CHAT, {"temperature": -1}, "temperature", "greater"),
    (CHAT, {"top_p": 0}, None, "top_p"),
    (CHAT, {"frequency_penalty": 3}, None, "frequency_penalty"),
    (CHAT, {"repetition_penalty": 1e-30}, "repetition_penalty", "greater"),
    (CHAT, {"logit_bias": {"dabada": 1}}, "logit_bias", "ids"),
    (CHAT, {"logit_bias": {"5": 1, "9" * 5000: 1}}, "logit_bias", "ids"),
    (CHAT, {"logit_bias": {"٣": 1}}, "logit_bias", "ids"),
    (CHAT, {"logit_bias": {"5": 1000}}, None, "logit_bias"),
    (CHAT, {"n": 0}, "n", "greater"),
    (CHAT, {"n": 9}, "n", "at most 8"),
    (CHAT, {"n": 10**9}, "n", "at most 8"),
    (CHAT, {"stop": ["x"] * 17}, "stop", "at most 16"),
    (CHAT, {"stop": ""}, "stop", "at least 1"),
    (CHAT, {"seed": "x"}, "seed", "integer"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", "not supported"),
    (CHAT, {"audio": {"voice": "a"}}, "audio", "not supported"),
    (CHAT, {"prediction": {"type": "content"}}, "prediction", "not supported"),
    (CHAT, {"web_search_options": {}}, "web_search_options", "not supported"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "use tools"),
    (CHAT, {"guided_json": {}}, "guided_json", "response_format"),
    (CHAT, {"use_beam_search": True}, "use_beam_search", "not supported"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "schema"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
        "response_format",
        "cannot be compiled",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
        "response_format",
        "cannot be compiled",
    ),
    (CHAT, {"tools": [{"type": "web"}]}, "tools.0.type", "function"),
    (CHAT, {"tools": [GET, GET]}, "tools", "same name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    (
        CHAT,
        {"tools": [GET, {"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}}]},
        "tools.1.function.parameters",
        "object",
    ),
    (
        CHAT,
        {"tools": [GET, {"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": 3}}}}]},
        "tools.1.function.parameters",
        "cannot be compiled",
    ),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "needs tools"),
    (
        CHAT,
        {"tools": [GET], "tool_choice": {"type": "function", "function": {"name": "put"}}},
        "tool_choice",
        "no tool here",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages.0.tool_calls.0.function.arguments",
        "JSON",
    ),
    (COMPLETIONS, {"prompt": None}, "prompt", ""),
    (COMPLETIONS, {"prompt": []}, "prompt", "from 1"),
    (COMPLETIONS, {"prompt": [[]]}, None, "empty"),
    (COMPLETIONS, {"prompt": ["a", 3]}, "prompt", ""),
    (COMPLETIONS, {"prompt": [1, 10**6]}, None, "outside the model's vocabulary"),
    (COMPLETIONS, {"prompt": [1, -1]}, None, "outside the model's vocabulary"),
    (COMPLETIONS, {"prompt": ["a"] * 2049}, "prompt", "2048"),
    (COMPLETIONS, {"suffix": "end"}, "suffix", "not supported"),
    (COMPLETIONS, {"best_of": 2}, "best_of", "use n"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs", "20"),
    (COMPLETIONS, {"response_format": {"type": "json_object"}}, "response_format", "chat"),
    ("/tokenize", {"messages": HELLO}, "prompt", "either"),
    ("/detokenize", {"tokens": [-1]}, "tokens.0", "greater"),
]


async def test_wrong_fields_are_named(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for path, fields, param, message in WRONG:
            for stream in (False, True):
                if stream and "stream_options" in fields:
                    continue
                reply = await post(http, path, stream=stream, **fields)
                assert reply.status_code == 400, (fields, reply.text)
                error = check_shape(reply)
                named = error["param"]
                assert named == param or (param is not None and str(named).startswith(f"{param}.")), (fields, error)
                assert message in error["message"], (fields, error)
                assert error["type"] == "invalid_request_error"
        assert await gateway.sessions() == []
        assert (await post(http, CHAT)).status_code == 200


async def test_fields_that_ask_for_nothing_pass(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("n", "stop", "seed", "logprobs", "top_logprobs", "tools", "tool_choice", "audio", "temperature", "logit_bias")
    )
    harmless = {"user": "me", "store": False, "metadata": {}, "service_tier": "auto", "made_up": [1, {"deep": None}]}
    defaults = {"modalities": ["text"], "parallel_tool_calls": True, "use_beam_search": False, "functions": []}
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for fields in (nothing, harmless, defaults):
            reply = await post(http, CHAT, **fields)
            assert reply.status_code == 200, reply.text
        reply = await post(http, COMPLETIONS, best_of=1, suffix=None, logprobs=None, echo=None)
        assert reply.status_code == 200, reply.text


async def test_unknown_models(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http, gateway.openai() as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="gpt-4o", messages=HELLO)  # type: ignore[arg-type]
        assert caught.value.code == "model_not_found"
        assert gateway.model in caught.value.message
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt/4o")
        for path in (COMPLETIONS, "/tokenize", "/detokenize"):
            reply = await post(http, path, model="\ud800", tokens=[])
            assert reply.status_code == 404
            assert check_shape(reply)["param"] == "model"


async def test_prompts_longer_than_the_context(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http, gateway.openai() as client:
        long = "dabada kilo " * 300
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=gateway.model, messages=[{"role": "user", "content": long}])
        assert caught.value.code == "context_length_exceeded"
        for stream in (False, True):
            reply = await post(http, COMPLETIONS, prompt=["short", long], stream=stream)
            assert (reply.status_code, check_shape(reply)["code"]) == (400, "context_length_exceeded")
        assert await gateway.sessions() == [], "the short one was not begun either"


BROKEN = [
    (b"", "body"),
    (b"{", "JSON"),
    (b'{"prompt": "a",}', "JSON"),
    (b"\xff\xfe", ""),
    (b"[]", ""),
    (b"null", ""),
    (b'"prompt"', ""),
    (b"[" * 100_000, ""),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", ""),
]


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", None])
async def test_bodies_that_are_no_request(
    content_type: str | None, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for body, message in BROKEN:
            for path in (COMPLETIONS, CHAT):
                reply = await http.post(path, content=body, headers=headers)
                assert reply.status_code == 400, (body[:50], reply.text)
                error = check_shape(reply)
                if content_type == "application/json" and path == COMPLETIONS:
                    assert message in error["message"], (body[:50], error)
        assert (await post(http, COMPLETIONS)).status_code == 200


async def test_curl_without_a_content_type(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    """`curl -d` says that it sends a form."""
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        reply = await http.post(COMPLETIONS, content=json.dumps({"prompt": "a"}), headers=form)
        assert reply.status_code == 400
        assert "application/json" in check_shape(reply)["message"]


async def test_unknown_paths_and_methods(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("POST", "/v1/embeddings", 404),
            ("GET", COMPLETIONS, 405),
            ("DELETE", CHAT, 405),
        ):
            reply = await http.request(method, path)
            assert reply.status_code == status
            assert check_shape(reply)["type"] == "invalid_request_error"


async def test_bodies_that_are_too_large(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 2**20

    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for content in (b" " * (17 * 2**20), pieces()):
            try:
                reply = await http.post(COMPLETIONS, content=content)
            except httpx.TransportError:
                # Refused while it was still being sent: the connection may be gone before the answer is read.
                continue
            assert reply.status_code == 413
            assert "16 MiB" in check_shape(reply)["message"]
        assert (await post(http, COMPLETIONS)).status_code == 200


async def test_a_model_without_a_chat_template(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    async with start_gateway(folder) as gateway, gateway.http() as http:
        reply = await post(http, CHAT)
        assert reply.status_code == 400
        assert "no chat template" in check_shape(reply)["message"]
        assert (await post(http, COMPLETIONS)).status_code == 200


async def test_a_template_that_refuses(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    async with start_gateway(folder) as gateway, gateway.http() as http:
        reply = await post(http, CHAT)
        assert reply.status_code == 400
        assert "roles must alternate" in check_shape(reply)["message"]
