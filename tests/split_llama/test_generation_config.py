"""generation_config.json is honoured, falls back to config.json, and is refused where it is malformed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON_VALUES
from tiny_models import TinyModel, write_json

from split_llama.checkpoint import Checkpoint
from split_llama.errors import CheckpointError, FlLlamaError
from split_llama.generation_config import GenerationDefaults

TinyCheckpoint = Callable[..., Path]


def generation(folder: Path, config: dict[str, Any], **raw: Any) -> Any:
    write_json(folder / "config.json", TinyModel(layers=1).config() | config)
    write_json(folder / "generation_config.json", raw)
    return Checkpoint.open(folder).generation_config()


def test_generation_config_is_honoured(tiny_checkpoint: TinyCheckpoint) -> None:
    found = generation(
        tiny_checkpoint(layers=1),
        {"eos_token_id": 9},
        eos_token_id=[2, 3, 2],
        bos_token_id=1,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.05,
        max_length=4096,
        transformers_version="5.0",
    )
    assert found.eos_token_ids == (2, 3)
    assert (found.bos_token_id, found.do_sample, found.temperature) == (1, True, 0.6)
    assert (found.top_p, found.top_k, found.repetition_penalty, found.max_length) == (0.9, 20, 1.05, 4096)
    assert found.max_new_tokens is None


def test_token_ids_fall_back_to_the_config(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=1)
    found = generation(folder, {"eos_token_id": [4, 5], "bos_token_id": 0}, eos_token_id=None)
    assert (found.eos_token_ids, found.bos_token_id) == ((4, 5), 0)
    (folder / "generation_config.json").unlink()
    assert Checkpoint.open(folder).generation_config().eos_token_ids == (4, 5)


@pytest.mark.parametrize(
    "raw",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [2, None]},
        {"eos_token_id": True},
        {"eos_token_id": [[2]]},
        {"bos_token_id": -1},
        {"temperature": "hot"},
        {"temperature": -0.5},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"top_k": 2.5},
        {"do_sample": "yes"},
        {"max_length": 10**400},
        {"repetition_penalty": []},
    ],
)
def test_malformed_generation_config(tiny_checkpoint: TinyCheckpoint, raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(raw))):
        generation(tiny_checkpoint(layers=1), {}, **raw)


@given(st.dictionaries(st.sampled_from(["eos_token_id", "temperature", "top_k", "do_sample"]), JSON_VALUES))
@settings(deadline=None)
def test_hostile_generation_config(raw: dict[str, Any]) -> None:
    with contextlib.suppress(FlLlamaError):
        GenerationDefaults.from_hf(raw, {})
