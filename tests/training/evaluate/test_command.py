"""`split-train evaluate` from flags to table: split rows without noise are the centralized ones, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft_oracle import write_random_adapter
from tiny_models import TinyModel, write_json, write_model

from split_llama.errors import AdapterMismatch, CheckpointError, ContextExceeded, ServerFault, UsageError
from training.commands.evaluate import main
from training.evaluate.server import local_server

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", TinyModel(layers=5))


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return ["--state-dir", str(tmp_path / "state"), "--cache-dir", str(tmp_path / "cache"), "--threads", "1"]


@pytest.fixture
def evaluate(model: Path, places: list[str], capsys: pytest.CaptureFixture[str]) -> Evaluate:
    def run(*flags: str) -> dict[str, Any]:
        assert main(["--model", str(model), "--codec", "fp32", "--json", "--quiet", *places, *flags]) == 0
        out: dict[str, Any] = json.loads(capsys.readouterr().out)
        return out

    return run


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[list[str]]:
    """The flags that lead to a server of its own accord."""
    with local_server([str(model), "--threads", "1"]) as server:
        yield ["--server", server.url, "--api-key", server.api_key]


def multirc(path: Path, questions: int = 6) -> Path:
    lines = []
    for at in range(questions):
        answers = [{"text": f"ba{letter}u", "label": (at + n) % 2} for n, letter in enumerate("ndk")]
        question = {"idx": 0, "question": f"du ba{'do' * at}?", "answers": answers}
        lines.append(json.dumps({"idx": at, "passage": {"text": f"Ka lu {'mi ' * at}so.", "questions": [question]}}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def pairs(path: Path) -> Path:
    lines = [json.dumps({"prompt": f"lu ka {'ni ' * at}", "response": f"so {at}"}) for at in range(5)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_label_task_with_adapter_noise_and_partitions(evaluate: Evaluate, model: Path, tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", model)
    data = multirc(tmp_path / "multirc.jsonl")
    told = evaluate(
        *("--data", str(data), "--adapter", str(adapter), "--noise", "2.0", "--partition", "2,1", "--partition", "1,2"),
        *("--attack", "vocabulary-matching", "--attack-texts", "1", "--attack-tokens", "9"),
    )
    assert (told["task"], told["examples"], told["left_out"]) == ("multirc", 18, 0)
    rows = told["rows"]
    assert [(row["model"], row["partition"], row["noise"]) for row in rows] == [
        ("centralized", None, None),
        ("centralized + adapter", None, None),
        ("split + adapter", "2,1", "0"),
        ("split + adapter", "2,1", "2.0"),
        ("split + adapter", "1,2", "0"),
        ("split + adapter", "1,2", "2.0"),
    ]
    assert rows[2]["scores"] == rows[1]["scores"] == rows[4]["scores"]
    assert set(rows[0]["scores"]) == {"f1a", "em"}
    assert all(row["examples_per_second"] > 0 for row in rows)
    assert [row.get("attack", {}).get("recovered") for row in rows[:3]] == [None, None, 1.0]


def test_free_answers_and_perplexity_are_those_of_the_whole_model(
    evaluate: Evaluate, running: list[str], tmp_path: Path
) -> None:
    data = pairs(tmp_path / "pairs.jsonl")
    central, split = evaluate(*running, "--data", str(data), "--max-new-tokens", "8")["rows"]
    assert split["scores"] == central["scores"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join("banu lido kan " * 9 for _ in range(9)), encoding="utf-8")
    central, split = evaluate(*running, "--data", str(text), "--max-length", "64")["rows"]
    assert set(central["scores"]) == {"perplexity"}
    assert split["scores"]["perplexity"] == pytest.approx(central["scores"]["perplexity"], rel=1e-5)


def test_noise_costs_the_model_and_the_attacker(evaluate: Evaluate, running: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("banu lido kan mise so " * 40, encoding="utf-8")
    attack = ["--attack", "vocabulary-matching", "--attack-texts", "1", "--attack-tokens", "9"]
    clean, noised = evaluate(*running, "--data", str(text), "--rows", "split", "--noise", "6.0", *attack)["rows"]
    assert noised["scores"]["perplexity"] != pytest.approx(clean["scores"]["perplexity"], rel=1e-3)
    assert clean["attack"] | {"shuffled": 0} == {
        "name": "vocabulary-matching", "recovered": 1.0, "tokens": 8, "shuffled": 0
    }  # fmt: skip
    assert noised["attack"]["recovered"] < 0.5
    assert clean["attack"]["shuffled"] < 0.5


def test_the_table_is_on_stdout_and_progress_on_stderr(
    model: Path, places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = multirc(tmp_path / "m.jsonl")
    assert main(["--model", str(model), "--data", str(data), "--rows", "central", "--limit", "4", *places]) == 0
    streams = capsys.readouterr()
    head, row = streams.out.splitlines()
    assert head.split() == ["model", "p,q", "noise", "codec", "f1a", "em", "examples/s"]
    assert row.split()[0] == "centralized"
    assert len(row) == len(head)
    assert "4/4" in streams.err


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([], UsageError, "Give --data FILE"),
        (["--task", "demo", "--noise", "loud"], UsageError, "loud"),
        (["--task", "demo", "--noise", "nan"], UsageError, "nan"),
        (["--task", "demo", "--partition", "auto"], UsageError, "auto"),
        (["--task", "demo", "--partition", "0,1"], UsageError, "--allow-embedding-states"),
        (["--task", "demo", "--partition", "3,2"], UsageError, "no block for the server"),
        (["--task", "demo", "--rows", "both"], UsageError, "--rows"),
        (["--task", "demo", "--rows", ","], UsageError, "--rows"),
        (["--task", "demo", "--rows", "central", "--noise", "1"], UsageError, "--noise is for the split rows"),
        (["--task", "demo", "--attack", "nearest"], UsageError, "nearest-embedding"),
        (["--task", "demos"], UsageError, "did you mean 'demo'"),
        (["--task", "demo", "--max-length", "100000"], UsageError, "256 positions"),
        (["--task", "demo", "--adapter", "/nowhere"], CheckpointError, "no PEFT adapter"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, flags: list[str], error: type[Exception], message: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be loaded")

    monkeypatch.setattr("training.evaluate.central.CentralModel.load", loads)
    with pytest.raises(error, match=message):
        evaluate(*flags)


def test_an_adapter_of_another_model_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", TinyModel(hidden=48))
    adapter = write_random_adapter(tmp_path / "adapter", other)
    with pytest.raises(AdapterMismatch, match="shape"):
        evaluate("--task", "demo", "--adapter", str(adapter))


def test_a_server_of_the_users_wants_the_adapters_name(evaluate: Evaluate, model: Path, tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", model)
    with pytest.raises(UsageError, match="NAME="):
        evaluate("--task", "demo", "--adapter", str(adapter), "--server", "http://127.0.0.1:1")


def test_a_server_of_the_users_is_used(evaluate: Evaluate, model: Path, tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", model)
    data = multirc(tmp_path / "m.jsonl")
    flags = [str(model), "--threads", "1", "--lora-modules", f"theirs={adapter}", "--max-model-len", "48"]
    with local_server(flags) as server:
        fixed = ["--server", server.url, "--api-key", server.api_key, "--data", str(data), "--rows", "split"]
        (row,) = evaluate(*fixed, "--adapter", f"theirs={adapter}", "--max-length", "48")["rows"]
        assert row["model"] == "split + adapter"
        longer = pairs(tmp_path / "pairs.jsonl")
        with pytest.raises(ContextExceeded, match="--max-length 48"):
            evaluate(*fixed[:4], "--data", str(longer), "--rows", "split", "--max-new-tokens", "50")


def test_a_server_that_does_not_come_up_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    write_json(broken / "config.json", {"model_type": "gpt2"})
    with pytest.raises(ServerFault, match="gpt2"), local_server([str(broken)]):
        pass
