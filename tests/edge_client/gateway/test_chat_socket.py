"""The chat protocol on a real socket; what answers is a fake that follows the question (`tests/chat_fake.py`)."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from chat_fake import WEBSOCKETS, FakeService, make_app
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from edge_client.gateway.chat_messages import (
    MAX_MESSAGE,
    SUBPROTOCOL,
    Cancel,
    Delta,
    Done,
    Error,
    Hello,
    Send,
    Usage,
    key_of,
    parse_request,
)
from edge_client.gateway.chat_socket import MAX_ANSWERS, PATH
from edge_client.settings import EdgeSettings
from split_llama.errors import SlowReader
from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway

Reply = dict[str, Any]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def address(service: FakeService) -> AsyncIterator[str]:
    async for url in _serve(make_app(service)):
        yield url


async def _serve(app: Any) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, ws=WEBSOCKETS))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        yield f"ws://127.0.0.1:{bound.getsockname()[1]}{PATH}"
        server.should_exit = True
        await serving


def ask(text: str, identifier: str = "a", **more: Any) -> str:
    return json.dumps({"type": "send", "id": identifier, "messages": [{"role": "user", "content": text}], **more})


async def take(client: ClientConnection) -> Reply:
    async with asyncio.timeout(20):
        reply: Reply = json.loads(await client.recv())
    return reply


async def send_and_take(client: ClientConnection, text: str) -> Reply:
    await client.send(text)
    return await take(client)


async def take_until(client: ClientConnection, kind: str, identifier: str = "a") -> list[Reply]:
    replies = [await take(client)]
    while (replies[-1]["type"], replies[-1].get("id")) != (kind, identifier):
        replies.append(await take(client))
    return replies


def text_of(replies: list[Reply], identifier: str = "a") -> str:
    return "".join(reply["text"] for reply in replies if reply["type"] == "delta" and reply["id"] == identifier)


async def until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what holds is in a counter of another task
            await asyncio.sleep(0.01)


async def test_it_says_first_what_answers_here(address: str) -> None:
    async with connect(address) as client:
        hello = await take(client)
    assert hello == {
        "type": "hello",
        "model": "demo",
        "max_model_len": 1024,
        "partition": [1, 1],
        "blocks": 8,
        "hidden_size": 128,
        "codec": "fp16",
        "noise": {"sigma": 0.0251, "clip": 17.3, "setting": "mean-abs=0.02"},
        "server": "http://127.0.0.1:8700",
        "defaults": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 256},
    }


async def test_an_answer_comes_in_pieces_with_its_figures_and_an_end(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("say four words of it"))
        replies = await take_until(client, "done")
    assert text_of(replies) == "four words of it "
    assert [reply["tokens"] for reply in replies if reply["type"] == "delta"] == [1, 1, 1, 1]
    assert replies[-1] == {"type": "done", "id": "a", "finish_reason": "stop"}
    assert replies[-2] == {
        "type": "usage",
        "id": "a",
        "prompt_tokens": 6,
        "cached_tokens": 0,
        "completion_tokens": 4,
        "round_trips": 4,
        "bytes_up": 300 * 9,
        "bytes_down": 1200,
        "rows_up": 9,
        "drafted": 0,
        "accepted": 0,
        "tokens_per_second": 100.0,
        "ttft_ms": 10.0,
    }


async def test_a_slow_answer_tells_its_figures_while_it_comes(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("count 12 every 0.1"))
        replies = await take_until(client, "done")
    counts = [reply["completion_tokens"] for reply in replies if reply["type"] == "usage"]
    assert len(counts) > 2
    assert counts == sorted(counts)
    assert counts[-1] == 12


async def test_settings_reach_the_answer_and_defaults_fill_the_rest(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("settings", temperature=1, top_p=0.5, max_tokens=7, seed=3))
        given = text_of(await take_until(client, "done"))
        await client.send(ask("settings"))
        usual = text_of(await take_until(client, "done"))
    for part in ("max_new_tokens=7", "temperature=1.0", "top_p=0.5", "seed=3"):
        assert part in given
    for part in ("max_new_tokens=256", "temperature=None", "top_p=None", "seed=None"):
        assert part in usual


async def test_what_nobody_says_is_as_the_gateway_was_started(address: str, service: FakeService) -> None:
    flags: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    service.settings = EdgeSettings(server="http://127.0.0.1:8700", seed=5, stop=("END",), max_new_tokens=9, **flags)
    async with connect(address) as client:
        assert (await take(client))["defaults"] == {"temperature": 0.8, "top_p": 0.9, "max_tokens": 9}
        await client.send(ask("settings"))
        usual = text_of(await take_until(client, "done"))
        await client.send(ask("settings", temperature=0, seed=6, max_tokens=3))
        given = text_of(await take_until(client, "done"))
    for part in (*(f"{name}={value}" for name, value in flags.items()), "seed=5", "stop=('END',)", "max_new_tokens=9"):
        assert part in usual
    for part in ("temperature=0.0", "seed=6", "max_new_tokens=3", "top_k=7", "stop=('END',)"):
        assert part in given


async def test_a_message_that_is_too_long_is_refused_and_the_connection_lives(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        for text, identifier in ((ask("x" * MAX_MESSAGE), "a"), ("x" * (MAX_MESSAGE + 1), None)):
            await client.send(text)
            refusal = await take(client)
            assert (refusal["type"], refusal["code"], refusal["id"]) == ("error", "context_exceeded", identifier)
            assert "at most 1,048,576" in refusal["message"]
        await client.send(ask("say still here"))
        assert text_of(await take_until(client, "done")) == "still here "


async def test_a_real_gateways_flags_and_bounds(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    flags = {"noise": "0", "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3}
    async with start_gateway(tiny_checkpoint(), edge=flags) as gateway:
        async with connect(gateway.url.replace("http:", "ws:") + PATH, proxy=None) as client:
            assert (await take(client))["defaults"] == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 3}
            await client.send(ask("dabada"))
            assert (await take_until(client, "done"))[-1]["finish_reason"] in ("length", "stop")
            await client.send(ask("x" * (MAX_MESSAGE + 1)))
            assert (await take(client))["code"] == "context_exceeded"
            with pytest.raises(ConnectionClosed):
                await send_and_take(client, "x" * (4 * MAX_MESSAGE + 1))
        assert client.close_code == 1009


async def test_two_answers_run_at_once(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("count 30 every 0.02", "slow"))
        await client.send(ask("say quick", "quick"))
        replies = await take_until(client, "done", "slow")
    order = [reply["id"] for reply in replies if reply["type"] == "done"]
    assert order == ["quick", "slow"]
    assert text_of(replies, "quick") == "quick "
    assert text_of(replies, "slow").split() == [str(number) for number in range(1, 31)]


async def test_a_cancelled_answer_ends_and_the_other_goes_on(address: str, service: FakeService) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("count 10000 every 0.01", "long"))
        await client.send(ask("count 40 every 0.01", "other"))
        await take_until(client, "delta", "long")
        await client.send(json.dumps({"type": "cancel", "id": "long"}))
        ended = await take_until(client, "done", "long")
        assert ended[-1]["finish_reason"] == "cancelled"
        # What came before is accounted for.
        assert [reply for reply in ended if reply["type"] == "usage" and reply["id"] == "long"]
        rest = await take_until(client, "done", "other")
        assert rest[-1]["finish_reason"] == "stop"
        # Its id is free again; nothing more comes under it but what is asked now.
        await client.send(ask("say again", "long"))
        assert text_of(await take_until(client, "done", "long"), "long") == "again "
    assert service.begun == service.ended == 3


async def test_a_cancel_right_behind_its_question_counts(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("count 10000 every 0.01"))
        await client.send('{"type": "cancel", "id": "a"}')
        assert (await take_until(client, "done"))[-1]["finish_reason"] == "cancelled"


async def test_a_cancel_of_what_is_over_is_no_error(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send('{"type": "cancel", "id": "never"}')
        await client.send(ask("say yes"))
        assert [reply["type"] for reply in await take_until(client, "done")] == ["delta", "usage", "done"]


BAD = [
    ("", None, "Invalid JSON"),
    ("[1]", None, "an object"),
    ("{" * 100_000, None, "Invalid JSON"),
    ('{"type": "shout", "id": "x"}', "x", "'send', 'cancel'"),
    ('{"id": "x"}', "x", "type"),
    ('{"type": "send", "id": "x", "messages": []}', "x", "messages"),
    ('{"type": "send", "id": "", "messages": [{"role": "user", "content": "hi"}]}', None, "id"),
    (json.dumps({"type": "cancel", "id": "x" * 65}), None, "id"),
    (ask("hi", "x", temprature=1), "x", "temprature"),
    (ask("hi", "x", temperature=-1), "x", "temperature"),
    (ask("hi", "x").replace('"id"', '"temperature": NaN, "id"'), "x", "temperature"),
    (ask("hi", "x", temperature="warm"), "x", "temperature"),
    (ask("hi", "x", top_p=0), "x", "top_p"),
    (ask("hi", "x", max_tokens=0), "x", "max_tokens"),
    (ask("hi", "x", max_tokens=True), "x", "max_tokens"),
    (ask("hi", "x", seed=-1), "x", "seed"),
    ('{"type": "send", "id": "x", "messages": [{"role": "wizard", "content": "hi"}]}', "x", "messages.0.role"),
    ('{"type": "send", "id": "x", "messages": [{"role": "user", "content": 3}]}', "x", "messages.0.content"),
    ('{"type": "send", "id": "x", "messages": [{"role": "user", "content": "\\ud800"}]}', None, "hex escape"),
    ('{"type": "cancel", "id": "\\ud800"}', None, "hex escape"),
]


@pytest.mark.parametrize(("sent", "identifier", "named"), BAD)
async def test_a_bad_message_is_named_and_the_connection_lives(
    address: str, sent: str, identifier: str | None, named: str
) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(sent)
        refusal = await take(client)
        assert (refusal["type"], refusal["code"], refusal["retry_after_ms"]) == ("error", "bad_request", 0)
        assert refusal["id"] == identifier or named == "hex escape"
        assert named in refusal["message"]
        await client.send(ask("say still here"))
        assert text_of(await take_until(client, "done")) == "still here "


async def test_a_binary_message_is_named(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(b"\x00")
        assert "binary" in (await take(client))["message"]


async def test_an_id_in_use_is_refused_and_its_answer_goes_on(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("count 30 every 0.02"))
        await client.send(ask("say no"))
        replies = await take_until(client, "done")
    assert [reply["code"] for reply in replies if reply["type"] == "error"] == ["bad_request"]
    assert text_of(replies).split()[-1] == "30"


async def test_too_many_answers_are_refused(address: str) -> None:
    async with connect(address) as client:
        await take(client)
        for number in range(MAX_ANSWERS + 1):
            await client.send(ask("count 1000 every 0.05", str(number)))
        refusal = (await take_until(client, "error", str(MAX_ANSWERS)))[-1]
    assert (refusal["code"], refusal["retry_after_ms"]) == ("limit_exceeded", 1000)


@pytest.mark.parametrize(("verb", "before"), [("fail", ""), ("break", "one two ")])
async def test_an_error_ends_its_answer_only(address: str, verb: str, before: str) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask(f"{verb} ServerUnreachable"))
        replies = await take_until(client, "error")
        assert text_of(replies) == before
        assert replies[-1]["code"] == "server_unreachable"
        assert replies[-1]["message"] == "ServerUnreachable: the words of the gateway"
        assert replies[-1]["retry_after_ms"] == 1500
        await client.send(ask("say on"))
        assert text_of(await take_until(client, "done")) == "on "


async def test_a_fault_of_ours_says_nothing_of_its_inside(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with connect(address) as client:
        await take(client)
        await client.send(ask("count nothing"))
        error = (await take_until(client, "error"))[-1]
    assert error["code"] == "server_fault"
    assert "invalid literal" not in error["message"]
    assert "invalid literal" in caplog.text


async def test_a_closed_connection_ends_its_answers(address: str, service: FakeService) -> None:
    async with connect(address) as client:
        await take(client)
        for name in "abc":
            await client.send(ask("count 10000 every 0.01", name))
        await take_until(client, "delta", "c")
    await until(lambda: service.ended == 3)


async def test_a_connection_that_breaks_ends_its_answers(address: str, service: FakeService) -> None:
    client = await connect(address)
    await client.send(ask("count 10000 every 0.01"))
    await take_until(client, "delta")
    client.transport.abort()
    await until(lambda: service.ended == 1)
    await client.wait_closed()


async def test_a_reader_that_does_not_read_is_closed(address: str, service: FakeService) -> None:
    async with connect(address, max_queue=1) as client:
        client.transport.pause_reading()
        await client.send(ask("fill 100000"))
        await until(lambda: service.ended == 1)
        client.transport.resume_reading()
        with pytest.raises(ConnectionClosed):
            await take_until(client, "done")
    assert client.close_code == SlowReader.close_code


async def test_a_key_comes_as_a_subprotocol_and_is_not_sent_back(service: FakeService) -> None:
    # "schlüssel?" in base64url without padding.
    offered = [SUBPROTOCOL, "key.c2NobMO8c3NlbD8"]
    async for address in _serve(make_app(service, key="schlüssel?")):
        async with connect(address, subprotocols=offered) as client:  # type: ignore[arg-type]
            assert (await take(client))["type"] == "hello"
            assert client.subprotocol == SUBPROTOCOL
        with pytest.raises(InvalidStatus):
            await connect(address, subprotocols=[SUBPROTOCOL])  # type: ignore[list-item]


@pytest.mark.parametrize("offered", [[], ["fl-llama"], ["key.!"], ["key._w"], ["key.a"], ["KEY.YQ"]])
def test_no_key_is_found_where_none_is(offered: list[str]) -> None:
    assert key_of(offered) is None


def test_the_first_key_counts() -> None:
    assert key_of(["fl-llama", "key.YQ", "key.Yg"]) == "a"


def test_the_page_of_the_protocol_has_every_message_and_field() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "chat.md").read_text(encoding="utf-8")
    examples = [json.loads(found) for found in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    by_type = {example["type"]: example for example in examples}
    for kind in (Send, Cancel):
        name = kind.model_fields["type"].annotation.__args__[0]  # type: ignore[union-attr]
        assert parse_request(by_type[name]).type == name
        assert all(f"`{field}`" in text for field in kind.model_fields if field != "type")
    for reply in (Hello, Delta, Usage, Done, Error):
        example = by_type[reply.model_fields["type"].default]
        assert reply.model_validate(example).model_dump(mode="json") == example
