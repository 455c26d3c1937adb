"""The edge against a real server: the same tokens as transformers, alone and in company, and mistakes caught early."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_client.generate import GenerationStats
from edge_client.runtime import EdgeRuntime
from edge_client.turn import GenerationParams
from split_llama import errors
from tests.edge_client.conftest import MakeSettings, ServeModel

PROMPT = [1, 5, 9, 70, 33]
COUNT = 60


def whole_model(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


async def answer(
    edge: EdgeRuntime, prompt: list[int], params: GenerationParams
) -> tuple[list[int], str, GenerationStats]:
    turn = edge.turn(prompt, params)
    async with edge.open() as session:
        text = "".join([event.text async for event in session.generate(prompt, turn)])
    return turn.tokens, text, session.stats


@pytest.mark.parametrize(
    ("family", "partition"),
    [("llama", "1,1"), ("llama3", "2,1"), ("mistral", "1,0"), ("qwen2", "0,2"), ("qwen3", "3,0")],
)
async def test_greedy_tokens_equal_transformers(
    family: str, partition: str, tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint(family=family, tie=family == "qwen3")
    expected = whole_model(folder, PROMPT, COUNT)
    async with serve_model(folder) as url:
        settings = edge_settings(url, partition=partition, allow_embedding_states=True)
        async with EdgeRuntime.connect(settings) as edge:
            tokens, _, stats = await answer(edge, PROMPT, edge.params(max_new_tokens=COUNT, ignore_eos=True))
    assert tokens == expected
    assert stats.round_trips == COUNT
    assert len(stats.itl_ms) == COUNT - 1


async def test_many_sessions_long_prompts_and_http(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    """Prompts longer than a chunk, 12 at once, give what each gives alone."""
    folder = tiny_checkpoint(max_positions=512)
    prompts = [[1, *[(7 * i + j) % 300 + 3 for j in range(40 * i % 300 + 1)]] for i in range(12)]
    async with serve_model(folder) as url:
        async with EdgeRuntime.connect(edge_settings(url), max_sessions=12) as edge:
            params = edge.params(max_new_tokens=12, ignore_eos=True)
            together = await asyncio.gather(*(answer(edge, prompt, params) for prompt in prompts))
        async with EdgeRuntime.connect(edge_settings(url, transport="http"), max_sessions=12) as edge:
            by_http = await asyncio.gather(*(answer(edge, prompt, params) for prompt in prompts[:4]))
    assert [tokens for tokens, _, _ in together] == [whole_model(folder, prompt, 12) for prompt in prompts]
    assert [tokens for tokens, _, _ in by_http] == [tokens for tokens, _, _ in together[:4]]


async def test_codecs_cost_what_they_promise(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint(hidden=64)
    per_token = {"fp32": 256, "fp16": 128, "bf16": 128, "int8": 66}
    async with serve_model(folder) as url:
        for codec, size in per_token.items():
            used = []
            for count in (2, 12):
                async with EdgeRuntime.connect(edge_settings(url, codec=codec)) as edge:
                    stats = (await answer(edge, PROMPT, edge.params(max_new_tokens=count, ignore_eos=True)))[2]
                    used.append((stats.bytes_up, stats.bytes_down))
            growth = [(later - earlier) / 10 for earlier, later in zip(*used, strict=True)]
            assert growth == [size + 32, size + 32], codec


async def test_same_prefix_same_noise_and_clean_bos(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint()
    async with serve_model(folder) as url:
        sent = []
        for _ in range(2):
            async with EdgeRuntime.connect(edge_settings(url, noise="0.5", codec="fp16")) as edge:
                turn = edge.turn(PROMPT, edge.params(max_new_tokens=8, ignore_eos=True))
                async with edge.open() as session:
                    async for _ in session.generate(PROMPT, turn):
                        pass
                    sent.append(list(session.remote.state.log.read(0, 11)))
        async with EdgeRuntime.connect(edge_settings(url, codec="fp32")) as edge:
            turn = edge.turn(PROMPT, edge.params(max_new_tokens=1, ignore_eos=True))
            async with edge.open() as session:
                async for _ in session.generate(PROMPT, turn):
                    pass
                clean = next(iter(session.remote.state.log.read(0, 1)))
    assert sent[0] == sent[1]
    assert sent[0][0] == clean, "BOS is public: exact, in fp32"


async def test_eos_stop_strings_and_context_end(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint(max_positions=64)
    tokens = whole_model(folder, PROMPT, 40)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[7]]}))
    ends_at = tokens.index(tokens[7]) + 1
    async with serve_model(folder) as url, EdgeRuntime.connect(edge_settings(url)) as edge:
        turn = edge.turn(PROMPT, edge.params())
        async with edge.open() as session:
            events = [event async for event in session.generate(PROMPT, turn)]
        assert turn.tokens == tokens[:ends_at]
        assert events[-1].finish_reason == "stop"
        endless, text, _ = await answer(edge, PROMPT, edge.params(ignore_eos=True))
        assert len(PROMPT) + len(endless) == 65, "the last token needs no place"
        stop = text[10:13]
        _, cut, _ = await answer(edge, PROMPT, edge.params(ignore_eos=True, stop=[stop]))
        assert cut == text[: text.index(stop)]
        with pytest.raises(errors.ContextExceeded, match=r"70 tokens, the context holds 64.*nothing was sent"):
            edge.turn([5] * 70, edge.params())
        with pytest.raises(errors.UsageError, match="empty"):
            edge.turn([], edge.params())


async def test_partitions_are_checked_before_anything_is_sent(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint()
    async with serve_model(folder, allowed_partitions="1,1") as url:
        for partition, message in (("0,1", "embeddings"), ("2,2", "less than 4"), ("1,0", "at least 1,1")):
            with pytest.raises(errors.UsageError, match=message):
                async with EdgeRuntime.connect(edge_settings(url, partition=partition)):
                    pass


async def test_own_copy_must_be_the_servers_model(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder, other = tiny_checkpoint(), tiny_checkpoint(seed=1)
    wider = tiny_checkpoint(intermediate=64)
    foreign = tiny_checkpoint()
    (foreign / "tokenizer.json").write_text((foreign / "tokenizer.json").read_text() + " ")
    async with serve_model(folder) as url:
        async with EdgeRuntime.connect(edge_settings(url, model=str(folder))) as edge:
            assert len((await answer(edge, PROMPT, edge.params(max_new_tokens=3, ignore_eos=True)))[0]) == 3
        for copy, message in ((other, "weights"), (wider, "geometry"), (foreign, "tokenizer")):
            with pytest.raises(errors.ModelMismatch, match=f"{message}.*nothing was sent"):
                async with EdgeRuntime.connect(edge_settings(url, model=str(copy))):
                    pass


async def test_full_server_lets_sessions_wait(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    """More sessions than the server takes at once all finish."""
    folder = tiny_checkpoint()
    async with (
        serve_model(folder, max_num_seqs=2) as url,
        EdgeRuntime.connect(edge_settings(url), max_sessions=6) as edge,
    ):
        params = edge.params(max_new_tokens=10, ignore_eos=True)
        results = await asyncio.gather(*(answer(edge, PROMPT, params) for _ in range(6)))
    assert {tuple(tokens) for tokens, _, _ in results} == {tuple(whole_model(folder, PROMPT, 10))}
