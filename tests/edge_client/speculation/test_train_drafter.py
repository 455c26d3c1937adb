"""`edge-client train-drafter`: from text through the split to a head that `--speculate auto` finds; and kept chats."""

from __future__ import annotations

import argparse
import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.commands import train_drafter
from edge_client.runtime import EdgeRuntime
from edge_client.speculation.collect import collect, draw_samples, final_states, read_documents
from edge_client.speculation.combined import CombinedDrafter
from edge_client.speculation.find import find_head, make_drafter
from edge_client.speculation.head_file import ends_digest, load_head
from edge_client.speculation.transcripts import TranscriptStore
from split_llama.checkpoint import Checkpoint
from split_llama.errors import CacheError, ServerFault, UsageError
from tests.edge_client.conftest import MakeSettings, ServeModel

LINES = "bada kelo tuna\n\nbada kelo tuna bada kelo\nkelo tuna bada kelo tuna bada\n" * 4


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_drafter.add_arguments(parser)
    return parser.parse_args(words)


async def test_a_head_is_trained_through_the_split_and_found(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings, tmp_path: Path, capfd: Any
) -> None:
    folder, text = tiny_checkpoint(), tmp_path / "text"
    text.write_text(LINES, encoding="utf-8")
    async with serve_model(folder) as url:
        settings = edge_settings(url)
        words = ["--text", str(text), "--samples", "2", "--chats", "--minutes", "0.02"]
        store = TranscriptStore(settings.states(), ends_digest(Checkpoint.open(folder)))
        store.append([1, *range(20, 60)])
        await train_drafter.train(settings, flags(*words))
    checkpoint = Checkpoint.open(folder)
    path = find_head(checkpoint, settings.states())
    assert path is not None
    assert load_head(path, ends_digest(checkpoint)).training["positions"] > 100
    assert isinstance(make_drafter("auto", checkpoint, settings.states()), CombinedDrafter)
    out, err = capfd.readouterr()
    assert out == ""
    assert "go through the server" in err
    assert str(path) in err


async def test_final_states_are_those_of_the_whole_model(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint()
    ids = [1, 7, 8, 9, 200, 4]
    async with serve_model(folder) as url, EdgeRuntime.connect(edge_settings(url)) as edge:
        states = await final_states(edge, ids)
        params = edge.params(max_new_tokens=1, ignore_eos=True)
        greedy = [[event.token async for event in edge.generate(ids[:n], params)] for n in (3, 6)]
    head = Checkpoint.open(folder).tensor("lm_head.weight")
    assert states.shape == (6, 32)
    assert [[int((head @ states[n - 1]).argmax())] for n in (3, 6)] == greedy


class FakeEdge:
    """An edge whose states count positions."""

    max_length = 8
    tokenizer = argparse.Namespace(encode=lambda line: [1, *map(ord, line)], bos_token_id=1)

    def __init__(self, answer: torch.Tensor | None = None) -> None:
        self.asked: list[list[int]] = []
        self._answer = answer

    async def final_states(self, ids: list[int]) -> torch.Tensor:
        self.asked.append(ids)
        return torch.ones(len(ids), 4) if self._answer is None else self._answer

    def params(self, **values: Any) -> Any:
        return values

    async def generate(self, ids: list[int], params: dict[str, Any]) -> Any:
        assert params["temperature"] == 1.0
        for token in range(params["max_new_tokens"]):
            yield argparse.Namespace(token=token)


async def test_lines_are_documents_and_long_ones_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ab\n\n  \nabcdefghijkl\n", encoding="utf-8")
    documents = read_documents(FakeEdge(), [tmp_path / "a"])
    assert documents == [[1, 97, 98], [1, *range(97, 103)]]
    notes: list[str] = []
    collected = await collect(FakeEdge(), [*documents, [1, 2]], notes.append)
    assert [ids for ids, _ in collected] == documents
    assert {states.dtype for _, states in collected} == {torch.float16}
    assert notes == ["text 1 of 3", "text 2 of 3"]


async def test_samples_begin_with_bos_and_fit() -> None:
    edge = FakeEdge()
    assert await draw_samples(edge, 2, lambda line: None) == [[1, 0, 1, 2, 3, 4, 5]] * 2
    edge.tokenizer = argparse.Namespace(bos_token_id=None)
    with pytest.raises(UsageError, match="give texts instead"):
        await draw_samples(edge, 2, lambda line: None)


@pytest.mark.parametrize("answer", [torch.ones(2, 4), torch.ones(3), torch.full((3, 4), float("nan"))])
async def test_wrong_states_are_told(answer: torch.Tensor) -> None:
    with pytest.raises(ServerFault, match="3 final states were expected"):
        await final_states(FakeEdge(answer), [1, 2, 3])


def test_texts_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(UsageError, match="as UTF-8 text"):
        read_documents(FakeEdge(), [tmp_path / "latin"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "what should the draft head learn from"),
        (["--samples", "-1"], "--samples must be 1 or more"),
        (["--samples", "3", "--minutes", "0"], "--minutes must be above 0"),
        (["--samples", "3", "--minutes", "nan"], "--minutes must be above 0"),
        (["--text", "/no/such/file"], "there is no such file"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_asked(words: list[str], said: str, tmp_path: Path) -> None:
    given = flags("--server", "http://127.0.0.1:9", "--state-dir", str(tmp_path), *words)
    with pytest.raises(UsageError, match=said):
        train_drafter.run(given)


def test_kept_chats_come_back(tmp_path: Path) -> None:
    store = TranscriptStore(tmp_path, "ab" * 32)
    assert store.read() == []
    store.append([5, 2**31, 0])
    store.append([])
    TranscriptStore(tmp_path, "ab" * 32).append([7])
    TranscriptStore(tmp_path, "cd" * 32).append([9])
    assert store.read() == [[5, 2**31, 0], [7]]
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert store.path.stat().st_size == 4 * 8
    store.clear()
    assert store.read() == []


def test_the_oldest_chats_go_when_room_is_short(tmp_path: Path) -> None:
    store = TranscriptStore(tmp_path, "ab" * 32, most_bytes=400)
    for number in range(100):
        store.append([number] * 9)
        assert store.path.stat().st_size <= 400
    kept = [ids[0] for ids in store.read()]
    assert kept == list(range(100 - len(kept), 100))
    assert len(kept) >= 5
    store.append([1] * 1000)
    assert [ids[0] for ids in store.read()] == kept
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_a_chat_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    store = TranscriptStore(tmp_path, "ab" * 32)
    store.append([1, 2, 3])
    whole = store.path.read_bytes()
    store.path.write_bytes(whole + whole[:9])
    assert store.read() == [[1, 2, 3]]
    store.append([4])
    assert store.read() == [[1, 2, 3], [4]]
    store.path.write_bytes(whole + whole[:2])
    store.append([4])
    assert store.read() == [[1, 2, 3], [4]]
    store.path.write_bytes(b"\xff" * 64)
    with pytest.raises(CacheError, match="cannot be read as transcripts"):
        store.read()


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    async def write(number: int) -> None:
        await asyncio.to_thread(TranscriptStore(tmp_path, "ab" * 32).append, [number] * 50)

    async def write_all() -> None:
        await asyncio.gather(*(write(number) for number in range(20)))

    asyncio.run(write_all())
    assert sorted(ids[0] for ids in TranscriptStore(tmp_path, "ab" * 32).read()) == list(range(20))
