"""/v1/completions through the openai package and plain HTTP, against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_client.tokenizer import EdgeTokenizer
from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway

PROMPT = "dabada kilo and bagafan remedo"
IDS = [1, 5, 9, 70, 33, 12, 201, 44]
EXACT = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


class Oracle:
    """The whole model, by transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        self.tokenizer = EdgeTokenizer.open(folder)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        out = self.model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens

    def text(self, ids: list[int], count: int) -> str:
        stream = self.tokenizer.stream(ids)
        return "".join([stream.push(token) for token in self.greedy(ids, count)]) + stream.flush()

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)


async def test_greedy_text_and_usage(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    oracle = Oracle(folder)
    ids = oracle.tokenizer.encode(PROMPT)
    async with start_gateway(folder) as gateway, gateway.openai() as client:
        answer = await client.completions.create(model=gateway.model, prompt=PROMPT, max_tokens=40, **EXACT)
        assert answer.choices[0].text == oracle.text(ids, 40)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 40)
        assert answer.usage.total_tokens == len(ids) + 40
        default = await client.completions.create(model=gateway.model, prompt=PROMPT, **EXACT)
        assert default.usage is not None
        assert default.usage.completion_tokens == 16
        assert default.usage.prompt_tokens_details is not None
        assert default.usage.prompt_tokens_details.cached_tokens == len(ids) - 1


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "lo"], IDS, [IDS, [1, 3], IDS[:4]]])
async def test_every_shape_of_a_prompt_streamed_or_not(
    prompt: Any, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint()
    oracle = Oracle(folder)
    many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [oracle.tokenizer.encode(one) if isinstance(one, str) else one for one in many]
    expected = [oracle.text(one, 9) for one in ids]
    async with start_gateway(folder, max_concurrent=2) as gateway, gateway.openai() as client:
        asked: dict[str, Any] = {"model": gateway.model, "prompt": prompt, "max_tokens": 9, **EXACT}
        whole = await client.completions.create(**asked)
        assert [choice.text for choice in whole.choices] == expected
        assert [choice.index for choice in whole.choices] == list(range(len(many)))
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == sum(map(len, ids))
        texts = [""] * len(many)
        reasons: dict[int, str] = {}
        usage = []
        async for chunk in await client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ):
            usage.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert texts == expected
        assert reasons == dict.fromkeys(range(len(many)), "length")
        assert usage[:-1] == [None] * (len(usage) - 1)
        assert usage[-1].completion_tokens == 9 * len(many)


async def test_stop_eos_and_the_words_of_vllm(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    oracle = Oracle(folder)
    tokens = oracle.greedy(IDS, 40)
    text = oracle.text(IDS, 40)
    stop = text[12:14]
    generation = {"eos_token_id": [2, tokens[20]]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    async with start_gateway(folder) as gateway, gateway.http() as http:

        async def ask(**body: Any) -> dict[str, Any]:
            given = {"prompt": IDS, "max_tokens": 40, "temperature": 0} | body
            reply = await http.post("/v1/completions", json=given)
            assert reply.status_code == 200, reply.text
            found: dict[str, Any] = reply.json()
            return found

        ended = await ask()
        assert ended["choices"][0]["finish_reason"] == "stop"
        assert ended["usage"]["completion_tokens"] == tokens.index(tokens[20]) + 1
        assert (await ask(ignore_eos=True))["choices"][0]["text"] == text
        for given in (stop, ["never there", stop]):
            cut = await ask(ignore_eos=True, stop=given)
            assert cut["choices"][0] == {
                "index": 0,
                "text": text[: text.index(stop)],
                "logprobs": None,
                "finish_reason": "stop",
            }
        by_id = await ask(ignore_eos=True, stop_token_ids=[tokens[5]])
        assert by_id["usage"]["completion_tokens"] == tokens.index(tokens[5]) + 1
        # Of one likely token top_k, min_p and top_p leave nothing to chance; a bias decides alone.
        for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
            drawn = await ask(ignore_eos=True, temperature=1.5, **narrow)
            assert drawn["choices"][0]["text"] == text
        biased = await ask(ignore_eos=True, max_tokens=3, logit_bias={"68": 100})
        assert biased["choices"][0]["text"] == oracle.tokenizer.decode([68] * 3)
        varied = await ask(ignore_eos=True, logit_bias={"68": 90}, frequency_penalty=2, max_tokens=60)
        assert 0 < varied["choices"][0]["text"].count(oracle.tokenizer.decode([68])) < 60


async def test_n_and_seeds(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.openai() as client:

        async def texts(n: int, seed: int, **more: Any) -> list[str]:
            answer = await client.completions.create(
                model=gateway.model, prompt=IDS, n=n, seed=seed, temperature=1.2, max_tokens=12, **more
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(IDS)
            assert [choice.index for choice in answer.choices] == list(range(n))
            return [choice.text for choice in answer.choices]

        three = await texts(3, 5)
        assert len(set(three)) == 3
        assert await texts(3, 5) == three
        assert await texts(1, 5) == three[:1], "the first choice does not depend on how many there are"
        assert await texts(2, 5, echo=True, logprobs=1) == [
            gateway.service.edge.tokenizer.decode(IDS) + text for text in three[:2]
        ]


def check_scores(choice: dict[str, Any], oracle: Oracle, ids: list[int], alternatives: int) -> None:
    """Everything lm-eval reads, against transformers' log-softmax."""
    lists, answer = choice["logprobs"], oracle.greedy(ids, 1)
    whole = ids + answer[: len(lists["tokens"]) - len(ids)]
    expected = oracle.logprobs(whole)
    assert len(lists["tokens"]) == len(whole)
    assert {len(values) for values in lists.values()} == {len(whole)}
    assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
    for at in range(1, len(whole)):
        row = expected[at - 1]
        assert lists["token_logprobs"][at] == pytest.approx(float(row[whole[at]]), abs=2e-4)
        top = lists["top_logprobs"][at]
        best = sorted(top.values(), reverse=True)[:alternatives]
        assert best == pytest.approx(row.topk(alternatives).values.tolist(), abs=2e-4)
        is_greedy = lists["token_logprobs"][at] == max(top.values())
        assert is_greedy == (int(row.argmax()) == whole[at])


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("partition", ["1,1", "2,0"])
async def test_scores_of_a_prompt_as_lm_eval_asks_for_them(
    max_tokens: int, partition: str, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=512)
    oracle = Oracle(folder)
    # The greedy continuation makes some of the prompt's tokens the likeliest ones; 160 rows are more than one chunk.
    long = IDS + oracle.greedy(IDS, 8) + [(7 * i) % 300 + 3 for i in range(160)]
    async with start_gateway(folder, edge={"partition": partition}) as gateway, gateway.http() as http:
        prompts = [IDS, long]
        body = {"model": gateway.model, "prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True}
        for _ in range(2):  # The second time the prompt is parked; its scores are not, so it is read anew.
            reply = await http.post("/v1/completions", json={**body, "temperature": 0, "seed": 1234})
            assert reply.status_code == 200, reply.text
            for choice, ids in zip(reply.json()["choices"], prompts, strict=True):
                check_scores(choice, oracle, ids, 1)
                assert len(choice["logprobs"]["tokens"]) == len(ids) + max_tokens
        five = await http.post("/v1/completions", json={**body, "prompt": IDS, "logprobs": 5})
        check_scores(five.json()["choices"][0], oracle, IDS, 5)


async def test_offsets_cut_the_text_into_its_tokens(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint()
    async with start_gateway(folder) as gateway, gateway.http() as http:
        body = {"prompt": "Où dabada 🙂 kilo", "max_tokens": 6, "logprobs": 0, "echo": True, "ignore_eos": True}
        whole = (await http.post("/v1/completions", json=body)).json()["choices"][0]
        assert whole["text"].startswith("Où dabada 🙂 kilo")
        lists = whole["logprobs"]
        assert all(len(top) == 1 for top in lists["top_logprobs"][1:])
        ends = [*lists["text_offset"][1:], len(whole["text"])]
        cuts = [whole["text"][begin:end] for begin, end in zip(lists["text_offset"], ends, strict=True)]
        for token, cut in zip(lists["tokens"], cuts, strict=True):
            # A lone byte becomes readable, as a replacement character, with the token behind it.
            assert cut.lstrip("\ufffd") == token or token == "<s>" or token.startswith("bytes:")
        assert "".join(cuts) == whole["text"]
        # The same, streamed: the lists of the pieces are those of the whole.
        pieces = []
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    pieces += json.loads(line[6:])["choices"]
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        for name, values in lists.items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values


async def test_nothing_to_make(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for echo, text in ((True, PROMPT), (False, "")):
            body = {"prompt": PROMPT, "max_tokens": 0, "echo": echo}
            reply = (await http.post("/v1/completions", json=body)).json()
            assert reply["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
            assert reply["usage"]["completion_tokens"] == 0
        assert await gateway.sessions() == []


async def test_models_tokens_and_health(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint()
    tokenizer = EdgeTokenizer.open(folder)
    async with start_gateway(folder, served_model_name="org/small") as gateway, gateway.http() as http:
        async with gateway.openai() as client:
            models = (await client.models.list()).data
            assert [(model.id, model.model_dump()["max_model_len"]) for model in models] == [("org/small", 256)]
            assert (await client.models.retrieve("org/small")).id == "org/small"
        ids = tokenizer.encode(PROMPT)
        reply = await http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True})
        assert reply.json() == {
            "count": len(ids),
            "max_model_len": 256,
            "tokens": ids,
            "token_strs": ["<s>", *[tokenizer.decode([token]) for token in ids[1:]]],
        }
        bare = await http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False})
        assert bare.json()["tokens"] == ids[1:]
        talk = await http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
        expected = tokenizer.encode("<s><user>Hi<|end|><assistant>", special_tokens=False)
        assert talk.json()["tokens"] == expected
        assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": PROMPT}
        info = (await http.get("/tokenizer_info")).json()
        assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
        assert "add_generation_prompt" in info["chat_template"]
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.get("/version")).json()["version"]
        await http.get("/nowhere/secret")
        metrics = (await http.get("/metrics")).text
        assert 'fl_llama_edge_requests_total{route="/tokenize",status="200"} 3.0' in metrics
        assert "secret" not in metrics


async def test_metrics_follow_the_answers(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        for _ in range(2):
            await http.post("/v1/completions", json={"prompt": IDS + IDS, "max_tokens": 7, "ignore_eos": True})
        figures = read_metrics(await http.get("/metrics"))
        assert figures['answers_total{ended="length"}'] == 2
        assert figures["prompt_tokens_total"] == 32
        assert figures["cached_tokens_total"] == 15
        assert figures["generation_tokens_total"] == 14
        assert figures["time_to_first_token_seconds_count"] == 2
        assert figures["inter_token_latency_seconds_count"] == 12
        assert 2 <= figures["round_trips_total"] <= 14
        assert figures["sent_bytes_total"] > 0 < figures["received_bytes_total"]
        assert (figures["num_requests_running"], figures["num_requests_waiting"]) == (0, 0)
        assert figures["num_conversations"] == 1


@pytest.mark.parametrize("extra", [{}, {"echo": True, "logprobs": 0}])
async def test_metrics_count_the_prompt_of_a_request_once(
    extra: dict[str, Any], tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    """Also where one choice scores the prompt before the others begin."""
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        body = {"prompt": IDS + IDS, "max_tokens": 4, "ignore_eos": True, "n": 3}
        held = []
        for _ in range(2):
            reply = await http.post("/v1/completions", json=body | extra)
            usage = reply.json()["usage"]
            assert usage["prompt_tokens"] == 16
            held.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert held == [0, 0 if extra else 15], "a prompt that is scored is sent anew"
        figures = read_metrics(await http.get("/metrics"))
        assert figures["prompt_tokens_total"] == 32
        assert figures["cached_tokens_total"] == held[1]
        assert figures["generation_tokens_total"] == 24
        assert figures['answers_total{ended="length"}'] == 6


async def test_ids_are_turned_into_text_only_for_echo(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http:
        decoded: list[list[int]] = []
        body = {"prompt": [IDS, IDS], "max_tokens": 0}
        decode = EdgeTokenizer.decode

        def counting(self: EdgeTokenizer, ids: list[int]) -> str:
            decoded.append(ids)
            return decode(self, ids)

        monkeypatch.setattr(EdgeTokenizer, "decode", counting)
        plain = await http.post("/v1/completions", json=body)
        assert [choice["text"] for choice in plain.json()["choices"]] == ["", ""]
        assert decoded == []
        echoed = await http.post("/v1/completions", json=body | {"echo": True})
        text = decode(gateway.service.edge.tokenizer, IDS)
        assert [choice["text"] for choice in echoed.json()["choices"]] == [text, text]
        assert decoded == [IDS, IDS]


def read_metrics(reply: Any) -> dict[str, float]:
    """Give the figures without their prefix."""
    lines = [line.rsplit(" ", 1) for line in reply.text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("fl_llama_edge_"): float(value) for name, value in lines if math.isfinite(float(value))}
