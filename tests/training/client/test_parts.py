"""The parts of a client by themselves: its folder, its data, its settings, what it adds up."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.settings import EdgeSettings
from split_llama.errors import FlLlamaError, JobEnded, ServerUnreachable, UsageError
from split_llama.settings import load_settings
from tests.training.client.people import Notes
from training.client import waiting
from training.client.data import DataPart
from training.client.jobs import JobKey, JobsClient
from training.client.loop import JobLoop
from training.client.pipeline import Micro, add_up
from training.client.run import ClientPlan, run_client
from training.client.setup import ClientFolder
from training.client.state import ClientState
from training.client.waiting import why_waiting
from training.compute.batch import Batch
from training.job_config import JobConfig
from training.settings import SECTION, TrainSettings


def test_a_folder_keeps_its_clients_secret_to_itself(tmp_path: Path) -> None:
    with ClientFolder.open(tmp_path, "ann", "job-1") as first:
        assert len(first.secret) == 64
        assert first.path.stat().st_mode & 0o077 == 0
        assert (first.path / "member.json").stat().st_mode & 0o077 == 0
        with (
            pytest.raises(UsageError, match="another process is at work"),
            ClientFolder.open(tmp_path, "ann", "job-1"),
        ):
            pass
    with ClientFolder.open(tmp_path, "ann", "job-1") as again:
        assert again.secret == first.secret
    with pytest.raises(UsageError, match="holds a client of job job-1"), ClientFolder.open(tmp_path, "ann", "job-2"):
        pass
    with ClientFolder.open(tmp_path, "bob", "job-2") as other:
        assert other.secret != first.secret
    (tmp_path / "client-ann" / "member.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"), ClientFolder.open(tmp_path, "ann", "job-1"):
        pass


def test_shares_of_a_file_are_all_of_it_once(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "p{n}", "response": "r"}}\n' for n in range(7)))
    shares = [DataPart("pairs", file, index, 3).read() for index in range(3)]
    assert sorted(example.prompt for share in shares for example in share) == [f"p{n}" for n in range(7)]
    assert len(DataPart("pairs", file).read()) == 7


@pytest.mark.parametrize("text", ["1", "a/2", "1/", "/2", "-1/2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="INDEX/OF"):
        DataPart.parse_share(text)
    with pytest.raises(UsageError, match="INDEX < OF"):
        DataPart("demo", None, *DataPart.parse_share("2/2"))


def test_micro_batches_are_added_in_their_order_without_the_bad_ones() -> None:
    batch = Batch.of([[1, 2, 3]], [[-100, 2, 3]])
    micros = [
        Micro(2.0, batch, {"w": torch.tensor([1.0])}),
        Micro(None, batch, None, "no number"),
        Micro(4.0, batch, {"w": torch.tensor([2.0])}),
    ]
    share = add_up(micros)
    assert (share.loss, share.targets, share.tokens, share.samples) == (None, 4, 6, 2)
    assert share.grads is not None
    assert share.grads["w"].item() == 3.0
    assert share.faults == ("no number",)
    assert add_up(micros[::2]).loss == 6.0
    assert add_up(micros[1:2]).grads is None
    # Adding must not write into what a micro-batch has.
    assert micros[0].grads is not None
    assert micros[0].grads["w"].item() == 1.0


def test_flags_go_before_environment_before_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[train]\nnoise = "0.1"\ndevice = "cpu"\nthreads = 3\n')
    environ = {"FL_LLAMA_TRAIN_NOISE": "0.2", "FL_LLAMA_TRAIN_THREADS": "2"}
    loaded = load_settings(TrainSettings, SECTION, {"noise": "0.3"}, environ=environ, config_file=file)
    assert (loaded.settings.noise, loaded.settings.threads, loaded.settings.device) == ("0.3", 2, "cpu")
    file.write_text('[train]\nnoize = "0.1"\n')
    with pytest.raises(UsageError, match="did you mean 'noise'"):
        load_settings(TrainSettings, SECTION, {}, environ={}, config_file=file)


@pytest.mark.parametrize(
    ("name", "value"), [("gradient_noise", -1), ("gradient_clip", 0), ("noise", "x"), ("clip", "0")]
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.replace("_", ".")):
        load_settings(TrainSettings, SECTION, {name: value}, environ={}, config_file=Path(os.devnull))


def test_the_connection_has_the_clients_settings_and_the_jobs() -> None:
    settings = TrainSettings(server="http://a:1", api_key="k", noise="0", threads=2)
    edge = settings.edge("2,1", "int8")
    assert isinstance(edge, EdgeSettings)
    assert (edge.server, edge.api_key, edge.noise, edge.threads) == ("http://a:1", "k", "0", 2)
    assert (edge.partition, edge.codec, edge.speculate) == ("2,1", "int8", "off")


def test_code_that_a_job_names_runs_only_where_the_user_allowed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says what a job is like; it must not decide what code runs here."""
    config = JobConfig.parse({"strategy": "left_pad:Strategy"}).model_dump(mode="json")
    monkeypatch.setattr(JobsClient, "status", lambda *_: {"config": config, "state": "waiting"})
    (tmp_path / "left_pad.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    plan = ClientPlan(JobKey("j", "k"), "ann", DataPart("demo", None), tmp_path / "out")
    for allowed in ((), ("another:One",)):
        settings = TrainSettings(server="http://127.0.0.1:9", strategy_plugin=allowed)
        with pytest.raises(UsageError, match=r"Nothing was imported.*--strategy-plugin left_pad:Strategy"):
            run_client(settings, plan, print)
    assert not (tmp_path / "out").exists()
    # Allowed, it goes on, to the server that is not there.
    allowing = TrainSettings(
        server="http://127.0.0.1:9", strategy_plugin=("left_pad:Strategy",), reconnect_seconds=0.0, model="demo"
    )
    with pytest.raises(FlLlamaError) as raised:
        run_client(allowing, plan, print)
    assert "strategy-plugin" not in raised.value.message


def test_a_job_that_is_over_is_told_to_newcomers_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JobConfig.parse({}).model_dump(mode="json")
    monkeypatch.setattr(JobsClient, "status", lambda *_: {"config": config, "state": "cancelled"})
    plan = ClientPlan(JobKey("j", "k"), "ann", DataPart("demo", None), tmp_path / "out")
    with pytest.raises(JobEnded, match="is cancelled and nobody can join"):
        run_client(TrainSettings(server="http://127.0.0.1:9"), plan, print)
    assert not (tmp_path / "out").exists()


def test_a_file_of_no_known_format_is_not_taken_for_running_text(tmp_path: Path) -> None:
    table = tmp_path / "letters.csv"
    table.write_text("prompt,response\nhi,there\n")
    with pytest.raises(UsageError, match=r"letters\.csv.*--task text"):
        DataPart("auto", table).read()
    assert len(DataPart("text", table).read()) == 1
    table.rename(tmp_path / "letters.txt")
    assert DataPart("auto", tmp_path / "letters.txt").known_task == "text"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "paused", "generation": 3}, "paused"),
        ({"state": "waiting", "generation": 0, "members": [{"present": True}]}, "2 more clients (1 of 3 are here)"),
        ({"state": "waiting", "generation": 0, "members": [{"present": True}] * 2}, "1 more client (2 of 3"),
        (
            {
                "state": "waiting",
                "generation": 2,
                "members": [{"name": "ann", "present": True}, {"name": "bob", "present": False}],
            },
            "waiting for bob, whose connection is gone, for up to 60 seconds",
        ),
        ({"state": "running", "generation": 2, "members": [{"name": "bob", "present": False}]}, ""),
        ({}, "3 more clients"),
    ],
    ids=str,
)
def test_why_a_client_waits_is_told_by_the_jobs_status(status: dict[str, Any], said: str) -> None:
    words = why_waiting(status, JobConfig.parse({"clients": 3, "rejoin_seconds": 60}))
    assert said in words
    assert bool(words) == bool(said)


async def test_why_a_client_waits_is_told_once_for_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "QUIET_SECONDS", 0.01)
    paused: dict[str, Any] = {"state": "paused"}
    answers: list[Any] = [paused, paused, ServerUnreachable("gone"), {"state": "waiting", "generation": 0}]
    asked: list[Any] = []
    enough = threading.Event()
    loop, notes = JobLoop(None, None, None), Notes()  # type: ignore[arg-type]

    def ask() -> dict[str, Any]:
        answer = answers[min(len(asked), len(answers) - 1)]
        asked.append(answer)
        if len(asked) == 6:
            enough.set()
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    telling = asyncio.create_task(waiting.tell_why(loop, JobConfig.parse({"clients": 1}), ask, notes))
    assert await asyncio.to_thread(enough.wait, 20)
    telling.cancel()
    assert len(notes.notes) == 2
    assert "paused" in notes.notes[0]
    assert "waiting for 1 more client" in notes.notes[1]


def client_state(folder: Path) -> ClientState:
    first = {"a": torch.zeros(2, 2)}
    return ClientState(first, JobConfig.parse({}), owns_optimizer=True, folder=folder, owner="ann")


def test_who_goes_on_with_another_course_keeps_nothing_of_later_steps_of_its_own(tmp_path: Path) -> None:
    state = client_state(tmp_path)
    for step in (1, 2, 3, 4):
        state.advance(step, {"a": torch.ones(2, 2)}, 1)
        state.confirm(step, None)
        if step in (1, 3):
            state.save(step)
    state.save_for_return()
    newest = {name: weight.clone() for name, weight in state.weights.items()}

    again = client_state(tmp_path)
    assert again.have() == (0, 1, 3, 4)
    again.go_on(2, None)
    # Step 2 of the course it joins stands for what it had: that, and the number of its data, outlives it.
    third = client_state(tmp_path)
    assert third.have() == (0, 1, 2)
    third.restore(2, None)
    assert torch.equal(third.weights["a"], newest["a"])
    assert third.cursor == 4
