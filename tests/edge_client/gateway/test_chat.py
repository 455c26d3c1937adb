"""/v1/chat/completions through the openai package: text, streams, log-probabilities, JSON, tools, conversations."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from edge_client.gateway.tool_calls import explain
from edge_client.tokenizer import EdgeTokenizer
from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway
from tests.edge_client.gateway.test_completions import Oracle, read_metrics

HELLO = [{"role": "user", "content": "dabada kilo"}]
EXACT: dict[str, Any] = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}
# A template that shows tools and calls itself, in Qwen's way.
HERMES_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id is defined %}#{{ m.tool_call_id }}{% endif %}<|end|>{% endfor %}<assistant>"
)


class Place(BaseModel):
    """What a model is made to answer."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["city", "village"]
    size: int = Field(ge=0, le=999)
    is_old: bool
    tags: list[Literal["a", "b"]] = Field(max_length=2)


class Weather(BaseModel):
    """Arguments of a tool."""

    model_config = ConfigDict(extra="forbid")
    place: Literal["Graz", "Linz"]
    days: int = Field(ge=1, le=9)


def tool(name: str, arguments: type[BaseModel]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": "It's <b>", "parameters": arguments.model_json_schema()},
    }


TOOLS = [tool("weather", Weather), tool("look_up", Place)]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema(), "strict": True}}


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


async def test_greedy_text_equals_transformers(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    oracle = Oracle(folder)
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "dabada"}, {"type": "text", "text": "kilo"}]},
    ]
    prompt = "<s><system>Be brief.<|end|><user>dabada\nkilo<|end|><assistant>"
    ids = oracle.tokenizer.encode(prompt, special_tokens=False)
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        for limit in ("max_tokens", "max_completion_tokens"):
            answer = await client.chat.completions.create(
                model=gateway.model, messages=messages, **{limit: 30}, **EXACT, metadata={"un": "known"}
            )
            assert answer.choices[0].message.content == oracle.text(ids, 30)
            assert answer.choices[0].message.role == "assistant"
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 30)
        unlimited = await client.chat.completions.create(model=gateway.model, messages=messages, **EXACT)
        assert unlimited.usage is not None
        assert unlimited.usage.total_tokens == 257, "to the end of the context; the last token needs no place"


async def test_a_stream_is_the_answer_in_pieces(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "max_tokens": 25, **EXACT}
        whole = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                **asked, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
            )
        ]
        assert chunks[0].choices[0].delta.role == "assistant"
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(deltas) == whole.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        entries = [entry for chunk in chunks[:-1] for entry in _entries(chunk.choices[0])]
        for mine, its in zip(entries, _entries(whole.choices[0]), strict=True):
            assert [top.token for top in mine.top_logprobs] == [top.token for top in its.top_logprobs]
            # The second request's prompt was there already: other products, another rounding.
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)
        plain = [c async for c in await client.chat.completions.create(**asked, stream=True)]
        assert all(len(chunk.choices) == 1 for chunk in plain)


def _entries(choice: Any) -> list[Any]:
    return [] if choice.logprobs is None else list(choice.logprobs.content)


async def test_logprobs_are_those_of_transformers(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    oracle = Oracle(folder)
    ids = oracle.tokenizer.encode("<s><user>dabada kilo<|end|><assistant>", special_tokens=False)
    tokens = oracle.greedy(ids, 20)
    expected = oracle.logprobs(ids + tokens)[len(ids) - 1 : -1]
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "max_tokens": 20, **EXACT}
        answer = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=4)
        entries = _entries(answer.choices[0])
        assert [entry.logprob for entry in entries] == pytest.approx(
            [float(row[token]) for row, token in zip(expected, tokens, strict=True)], abs=2e-4
        )
        tops = torch.tensor([[top.logprob for top in entry.top_logprobs] for entry in entries])
        assert torch.allclose(tops, expected.topk(4, dim=-1).values, atol=2e-4)
        text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
        # A decoder writes one replacement character per lone byte, Python one per broken sequence.
        assert text.replace("\ufffd", "") == (answer.choices[0].message.content or "").replace("\ufffd", "")
        bare = await client.chat.completions.create(**asked, logprobs=True)
        assert [entry.top_logprobs for entry in _entries(bare.choices[0])] == [[]] * 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_json_is_what_its_schema_says(
    temperature: float, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    """From a model of random weights; whatever it writes, pydantic takes it."""
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "temperature": temperature, "seed": 3}
        answer = await client.chat.completions.create(**asked, response_format=SCHEMA, n=3)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            Place.model_validate_json(choice.message.content or "")
        cut = await client.chat.completions.create(**asked, response_format=SCHEMA, max_tokens=4)
        assert cut.choices[0].finish_reason == "length"
        parsed = await client.chat.completions.parse(**asked, response_format=Place)
        assert isinstance(parsed.choices[0].message.parsed, Place)
        anything = await client.chat.completions.create(
            **asked, response_format={"type": "json_object"}, logit_bias={"96": 20}, max_tokens=100
        )
        assert anything.choices[0].finish_reason == "stop"
        assert isinstance(json.loads(anything.choices[0].message.content or ""), dict)


ARGUMENTS = {"weather": Weather, "look_up": Place}


@pytest.mark.parametrize("template", [None, HERMES_TEMPLATE, HERMES_TEMPLATE.replace("<tool_call>", '{"parameters": ')])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
async def test_forced_tools(
    template: str | None, choice: Any, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=4096)
    if template is not None:
        set_template(folder, template)
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
        asked |= {"seed": 1, "temperature": 0.8, "parallel_tool_calls": False, "max_tokens": 900}
        answer = await client.chat.completions.create(**asked)
        found = answer.choices[0]
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        assert found.message.tool_calls is not None
        (call,) = found.message.tool_calls
        assert call.type == "function"
        ARGUMENTS[call.function.name].model_validate_json(call.function.arguments)
        if choice != "required":
            assert call.function.name == "look_up"
        streamed = [chunk.choices[0] async for chunk in await client.chat.completions.create(**asked, stream=True)]
        deltas = [delta for choice in streamed for delta in choice.delta.tool_calls or []]
        assert deltas[0].function is not None
        assert (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", call.function.name)
        assert deltas[0].id
        assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == call.function.arguments
        assert "".join(choice.delta.content or "" for choice in streamed) == ""
        assert streamed[-1].finish_reason == "tool_calls"


async def test_tools_that_may_be_called(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    """A model of random weights calls nothing by itself. `none` shows it no tools at all."""
    folder = tiny_checkpoint(max_positions=2048)
    tokenizer = EdgeTokenizer.open(folder)
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "tools": TOOLS, "max_tokens": 30, **EXACT}
        plain = await client.chat.completions.create(**asked)
        assert plain.choices[0].message.tool_calls is None
        assert plain.choices[0].message.content
        bare = {key: value for key, value in asked.items() if key != "tools"}
        untold = await client.chat.completions.create(**bare)
        none = await client.chat.completions.create(**asked, tool_choice="none")
        assert none.choices[0].message.content == untold.choices[0].message.content != plain.choices[0].message.content
        assert none.usage is not None
        assert untold.usage is not None
        assert none.usage.prompt_tokens == untold.usage.prompt_tokens
        prompt = tokenizer.decode(gateway.service.chat_ids(HELLO, tools=TOOLS))
        assert explain(TOOLS) in prompt


def add_trigger(folder: Path) -> int:
    """Make the last token `<tool_call>`, as Qwen's tokenizer has it; give its id."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"].pop()
    token = max(raw["model"]["vocab"].values())
    raw["model"]["vocab"] = {piece: place for piece, place in raw["model"]["vocab"].items() if place != token}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"].append({"id": token, "content": "<tool_call>", **flags})
    path.write_text(json.dumps(raw))
    return token


@pytest.mark.parametrize("parallel", [True, False])
async def test_a_call_the_model_chose(
    parallel: bool, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    """Pushed to the trigger at every chance; what follows it is held to a tool's schema."""
    folder = tiny_checkpoint(max_positions=4096)
    token = add_trigger(folder)
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "tools": TOOLS, "max_tokens": 600}
        asked |= {"seed": 1, "temperature": 0.7, "parallel_tool_calls": parallel, "logit_bias": {str(token): 60}}
        answer = (await client.chat.completions.create(**asked)).choices[0]
        calls = answer.message.tool_calls or []
        assert (len(calls) > 1) == parallel
        # With nothing to stop it the last call is cut by max_tokens.
        assert answer.finish_reason == ("length" if parallel else "tool_calls")
        assert answer.message.content is None
        for call in calls[: -1 if parallel else None]:
            assert call.type == "function"
            ARGUMENTS[call.function.name].model_validate_json(call.function.arguments)
        assert len({call.id for call in calls}) == len(calls)
        streamed = [chunk.choices[0] async for chunk in await client.chat.completions.create(**asked, stream=True)]
        deltas = [delta for choice in streamed for delta in choice.delta.tool_calls or []]
        for index, call in enumerate(calls):
            assert call.type == "function"
            mine = [delta.function for delta in deltas if delta.index == index and delta.function is not None]
            assert mine[0].name == call.function.name
            assert "".join(function.arguments or "" for function in mine) == call.function.arguments


TALK: list[Any] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"place": "Graz", "days": 2}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


@pytest.mark.parametrize("is_native", [True, False])
async def test_calls_and_results_reach_the_model(
    is_native: bool, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=1024)
    if is_native:
        set_template(folder, HERMES_TEMPLATE)
    async with start_gateway(folder) as gateway, gateway.http() as http:
        body: dict[str, Any] = {"messages": TALK, "tools": TOOLS[:1]}
        tokens = (await http.post("/tokenize", json=body)).json()["tokens"]
        text = gateway.service.edge.tokenizer.decode(tokens)
        if is_native:
            shown = json.dumps(TOOLS[0], ensure_ascii=False)
            expected = (
                f"<tools>{shown}</tools><user>Weather?<assistant>"
                '<tool_call>{"place": "Graz", "days": 2}</tool_call><tool>sunny#c1<assistant>'
            )
        else:
            expected = (
                f"<system>{explain(TOOLS[:1])}<user>Weather?<assistant>"
                '<tool_call>\n{"name": "weather", "arguments": {"place": "Graz", "days": 2}}\n</tool_call>'
                "<user><tool_response>\nsunny\n</tool_response><assistant>"
            )
        assert text == expected
        reply = await http.post("/v1/chat/completions", json={**body, "max_tokens": 3})
        assert reply.json()["usage"]["prompt_tokens"] == len(tokens)


async def test_json_beside_tools(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint(max_positions=2048)
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        for seed in range(3):
            answer = await client.chat.completions.create(
                model=gateway.model, messages=HELLO, tools=TOOLS, response_format=SCHEMA, seed=seed, temperature=1.5
            )
            choice = answer.choices[0]
            if choice.finish_reason == "stop":
                Place.model_validate_json(choice.message.content or "")
            else:
                assert choice.finish_reason == "tool_calls"
                for call in choice.message.tool_calls or []:
                    assert call.type == "function"
                    ARGUMENTS[call.function.name].model_validate_json(call.function.arguments)


async def test_a_second_turn_sends_its_new_tokens_only(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    """A conversation of about a thousand tokens: the second turn's rows are counted, and its text is the whole's."""
    folder = tiny_checkpoint(max_positions=2048)
    words = " ".join(f"kilo{i} dabada" for i in range(110))
    async with (
        start_gateway(folder, edge={"codec": "fp32"}) as gateway,
        gateway.openai() as client,
        gateway.http() as http,
    ):
        messages: list[Any] = [{"role": "user", "content": words}]
        asked: dict[str, Any] = {"model": gateway.model, "max_tokens": 20, **EXACT, "logit_bias": {"67": 100}}
        first = await client.chat.completions.create(messages=messages, **asked)
        before = read_metrics(await http.get("/metrics"))
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And then?"},
        ]
        second = await client.chat.completions.create(messages=messages, **asked)
        after = read_metrics(await http.get("/metrics"))
        assert first.usage is not None
        assert second.usage is not None
        assert first.usage.prompt_tokens > 900
        details = second.usage.prompt_tokens_details
        assert details is not None
        # All of the first prompt and its answer but the token that was never fed.
        held = first.usage.prompt_tokens + 19
        assert details.cached_tokens == held
        new = second.usage.prompt_tokens - held
        sent = after["sent_bytes_total"] - before["sent_bytes_total"]
        row = 32 * 4
        assert sent < (new + 20) * (row + 200), "new tokens and the answer's, with their frames"
        async with start_gateway(folder) as other, other.openai() as fresh:
            whole = await fresh.chat.completions.create(messages=messages, **asked)
            assert whole.choices[0].message.content == second.choices[0].message.content


async def test_two_tabs_on_one_conversation(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint(max_positions=512)
    async with start_gateway(folder) as gateway, gateway.openai() as client:

        async def say(words: list[str]) -> Any:
            messages: list[Any] = [
                {"role": "user" if i % 2 == 0 else "assistant", "content": w} for i, w in enumerate(words)
            ]
            return await client.chat.completions.create(model=gateway.model, messages=messages, max_tokens=40, **EXACT)

        first = await say(["dabada kilo remedo bagafan"])
        said = first.choices[0].message.content
        tabs = [["dabada kilo remedo bagafan", said, f"question {tab}"] for tab in ("one", "two")]
        together = await asyncio.gather(*(say(tab) for tab in tabs))
        async with start_gateway(folder) as other, other.openai() as fresh:
            for tab, answer in zip(tabs, together, strict=True):
                messages: list[Any] = [
                    {"role": "user" if i % 2 == 0 else "assistant", "content": w} for i, w in enumerate(tab)
                ]
                alone = await fresh.chat.completions.create(
                    model=other.model, messages=messages, max_tokens=40, **EXACT
                )
                assert answer.choices[0].message.content == alone.choices[0].message.content
                assert answer.usage.prompt_tokens_details.cached_tokens > 20


async def test_the_synchronous_client(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway:

        def talk() -> tuple[str, str]:
            with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any") as client:
                asked: dict[str, Any] = {"model": gateway.model, "messages": HELLO, "max_tokens": 8, **EXACT}
                whole = client.chat.completions.create(**asked).choices[0].message.content
                stream = client.chat.completions.create(**asked, stream=True)
                return whole or "", "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        whole, streamed = await asyncio.to_thread(talk)
        assert whole == streamed != ""


async def test_sixteen_at_once_over_one_connection(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint()
    async with start_gateway(folder, max_concurrent=16) as gateway, gateway.openai() as client, gateway.http() as http:

        async def ask(number: int) -> str:
            answer = await client.chat.completions.create(
                model=gateway.model,
                messages=[{"role": "user", "content": f"number {number}"}],
                max_tokens=20,
                **EXACT,
            )
            return answer.choices[0].message.content or ""

        together = await asyncio.gather(*(ask(number) for number in range(16)))
        alone = [await ask(number) for number in range(16)]
        assert together == alone
        server = await http.get(f"{gateway.server}/metrics")
        assert "fl_llama_connections_opened_total 1.0" in server.text


def audio_part() -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"x").decode(), "format": "wav"}}


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "data:,"}}, audio_part()])
async def test_parts_that_are_no_text_are_refused_by_name(
    part: dict[str, Any], tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.openai() as client:
        messages: list[Any] = [*HELLO, {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=gateway.model, messages=messages)
        assert caught.value.param == "messages.1.content.1.type"
        assert part["type"] in caught.value.message
