"""Token ids against transformers' AutoTokenizer, streamed text against decoding all at once."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from edge_client.tokenizer import EdgeTokenizer
from split_llama.demo import demo_model_path
from split_llama.errors import CheckpointError, UsageError

NAMES = ("stories260K", "llama2-tokenizer", "demo")
TEXTS = st.text(max_size=30) | st.text("aé漢🙂 ▁\n<s>", max_size=20)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def both(folder: Path) -> tuple[EdgeTokenizer, Any]:
    return EdgeTokenizer.open(folder), AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, data_dir: Path) -> Path:
    return demo_model_path() if request.param == "demo" else data_dir / request.param


@QUICK
@given(text=TEXTS)
def test_ids_equal_transformers(folder: Path, text: str) -> None:
    ours, theirs = both(folder)
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode(text, special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@QUICK
@given(text=TEXTS)
def test_streamed_text_equals_the_whole(folder: Path, text: str) -> None:
    tokenizer, _ = both(folder)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    # A character that looks like an incomplete one may come late, but it comes.
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@QUICK
@given(prompt=st.text(min_size=1, max_size=12), answer=st.text("abc é漢🙂", min_size=1, max_size=12))
def test_streamed_text_continues_its_prompt(folder: Path, prompt: str, answer: str) -> None:
    tokenizer, _ = both(folder)
    context, ids = tokenizer.encode(prompt), tokenizer.encode(answer, special_tokens=False)
    before, whole = tokenizer.decode(context), tokenizer.decode(context + ids)
    stream = tokenizer.stream(context)
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert before + text == whole or "\ufffd" in whole


@QUICK
@given(ids=st.lists(st.integers(0, 500), max_size=25))
def test_any_tokens_can_be_streamed(folder: Path, ids: list[int]) -> None:
    tokenizer, _ = both(folder)
    stream = tokenizer.stream()
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    whole = tokenizer.decode(ids)
    assert text == whole or "\ufffd" in whole


def test_incomplete_characters_are_held_back(data_dir: Path) -> None:
    tokenizer, _ = both(data_dir / "stories260K")
    ids = tokenizer.encode("🙂!", special_tokens=False)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["🙂", "!"]
    assert pieces[-1] == "!"
    broken = tokenizer.stream()
    assert [broken.push(token) for token in ids[:3]] == ["", "", ""]
    assert "\ufffd" in broken.flush()


def test_tokens_need_few_decodings(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = EdgeTokenizer.open(data_dir / "stories260K")
    longest = 0
    decode = tokenizer.decode

    def measured(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", measured)
    stream = tokenizer.stream(tokenizer.encode("Once upon a time"))
    for token in tokenizer.encode("there was a little girl called Lily. " * 20):
        stream.push(token)
    assert longest < 20


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
        {"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<begin>", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "legacy": False},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
)
def test_tokenizer_config_is_followed(data_dir: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copy(data_dir / "stories260K" / "tokenizer.json", tmp_path)
    shutil.copy(data_dir / "stories260K" / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changes))
    ours, theirs = EdgeTokenizer.open(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("Once upon a time", " two  spaces", "", "<s>[INST] hi [/INST]</s> there"):
        assert ours.encode(text) == theirs(text).input_ids, text


def test_a_prompt_that_is_no_text(data_dir: Path) -> None:
    tokenizer, _ = both(data_dir / "stories260K")
    with pytest.raises(UsageError, match="character 1"):
        tokenizer.encode("a\udcff")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        EdgeTokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        EdgeTokenizer.open(tmp_path)
