"""`split-train run` and `server` with real processes: results, what is said, and that nothing is left running."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from split_llama.errors import ModelMismatch, NotOwner, UsageError
from split_llama.hub import resolve_model
from split_llama.lora import parse_adapter, read_adapter
from training.client.jobs import JobKey
from training.commands.client import main as join
from training.commands.run import main
from training.commands.server import main as serve
from training.run import known_job, own_folder
from training.run_file import RunFile

PATIENCE = 120.0
SMALL = ["job.batch_size=2", "job.max_length=96", "job.lora.r=2", "client.tensorboard=false", "job.checkpoint_every=2"]


def command(out: Path, *words: str, sets: tuple[str, ...] = (), what: str = "run") -> list[str]:
    changes = [f"--set={change}" for change in (*SMALL, f"out={out}", *sets)]
    return [sys.executable, "-m", "training.cli", what, "demo", *changes, *words]


@contextlib.contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stderr=stream)
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def steps(out: Path, name: str) -> int:
    file = out / f"client-{name}" / "log.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def read_records(out: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / f"client-{name}" / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


@pytest.mark.slow
def test_a_run_is_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with started(command(out, sets=("job.steps=40",)), log) as process:
        wait(lambda: steps(out, "0") >= 3)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        wait(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family))
    assert f"split-train run demo --set={SMALL[0]}" in log.read_text()
    assert "--set=job.steps=40 --resume" in log.read_text()
    before = [len(read_records(out, name)) for name in ("0", "1")]
    assert "left after step" in (out / "client-0" / "client.log").read_text()

    again = subprocess.run(
        command(out, "--resume", sets=("job.steps=40",)), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "split-train export" in again.stderr
    assert "edge-client chat" in again.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("done", 40)
    # What was done before the interruption counts.
    records = [read_records(out, name) for name in ("0", "1")]
    assert all(0 < first < len(all_of) for first, all_of in zip(before, records, strict=True))
    assert summary["samples"] == sum(record["samples"] for each in records for record in each)
    assert summary["bytes_up"] > sum(each[-1]["bytes_up"] for each in records)
    assert summary["loss_last"] < summary["loss_first"]
    # The job shares A, B and C, so both have the same A and C, and the server has all.
    shared = parse_adapter((out / "shared.safetensors").read_bytes(), "shared")
    blocks = {0, shared.blocks[-1]}
    for name in ("0", "1"):
        adapter = read_adapter(out / f"client-{name}" / "adapter")
        assert set(adapter.blocks) == blocks
        assert all(bool((tensor == shared.tensors[key]).all()) for key, tensor in adapter.tensors.items())


def test_a_client_that_cannot_go_on_ends_all_and_is_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.run(
        command(out, sets=("client.dtype=float12",)), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 3
    assert "ended early (exit code 2)" in ended.stderr
    assert "dtype must be one of" in ended.stderr
    assert "stopped" in (out / "server.log").read_text()


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a run already: go on with it by --resume"):
        main(command(tmp_path)[4:])
    with pytest.raises(UsageError, match="no run in"):
        main([*command(tmp_path / "empty")[4:], "--resume"])


def test_a_run_of_another_job_is_not_gone_on_with(tmp_path: Path) -> None:
    file = RunFile.read("demo", [f"out={tmp_path}"])
    (tmp_path / "job.json").write_text(json.dumps({"job": "j", "config": file.job.model_dump(mode="json")}))
    with pytest.raises(UsageError, match="job or key is not there"):
        known_job(file)
    (tmp_path / "job-key").write_text("flj-key")
    assert known_job(file) == JobKey("j", "flj-key")
    with pytest.raises(UsageError, match="another \\[job\\]"):
        known_job(RunFile.read("demo", [f"out={tmp_path}", "job.steps=3"]))


def test_what_differs_from_the_run_that_is_gone_on_with_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = RunFile.read("demo").job.model_dump(mode="json")
    (tmp_path / "job.json").write_text(json.dumps({"job": "j", "config": config}))
    with pytest.raises(UsageError, match=r"job\.steps was 150, is 3; job\.lora\.r was 8, is 4\. Give its own file"):
        main(["demo", f"--set=out={tmp_path}", "--set=job.steps=3", "--set=job.lora.r=4", "--resume"])
    assert not (tmp_path / "server.log").exists()


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    with own_folder(tmp_path):
        with pytest.raises(UsageError, match="another run is at work"):
            main(["demo", f"--set=out={tmp_path}"])
        with pytest.raises(UsageError, match="another run is at work"):
            serve(["demo", f"--set=out={tmp_path}"])
    assert not (tmp_path / "server.log").exists()


def test_a_run_that_is_done_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = RunFile.read("demo", [f"out={tmp_path}"])
    (tmp_path / "job.json").write_text(json.dumps({"job": "j", "config": file.job.model_dump(mode="json")}))
    (tmp_path / "job-key").write_text("flj-key")
    summary = {"state": "done", "steps": 150, "seconds": 70.0, "loss_first": 2.5, "loss_last": 0.1, "bytes_up": 5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["demo", f"--set=out={tmp_path}", "--resume"]) == 0
    said = capsys.readouterr().err
    assert "is done already" in said
    assert "loss 2.500 -> 0.100" in said
    assert "split-train export" in said
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert not (tmp_path / "server.log").exists()


def test_a_wrong_server_flag_is_said_without_the_servers_help(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        main(command(tmp_path, sets=("server.modell=demo",))[4:])
    assert "does not take the section [server]: unrecognized arguments: --modell=demo" in raised.value.message
    assert "usage:" not in raised.value.message


def test_wrong_data_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\nno json\n')
    sets = ("data.task=pairs", f"data.train={tmp_path / 'train.jsonl'}")
    with pytest.raises(UsageError, match=r"train\.jsonl, line 2"):
        main(command(tmp_path / "out", sets=sets)[4:])
    assert not (tmp_path / "out").exists()


def another_copy(folder: Path, change: str) -> Path:
    """A copy of the demo model with another tokenizer, or other weights."""
    shutil.copytree(resolve_model("demo"), folder)
    if change == "tokenizer":
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace('"kitchen"', '"kitchem"', 1) + " ")
    else:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.self_attn.q_proj.weight"] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_clients_elsewhere_are_told_how_to_join_and_only_the_right_ones_can(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(command(tmp_path / "out", sets=("job.steps=2", "job.clients=1"), what="server"), log) as process:
        wait(lambda: "split-train client" in log.read_text())
        line = next(line for line in log.read_text().splitlines() if "split-train client" in line)
        told = [{"NAME": "ann", "DIR": str(tmp_path / "ann")}.get(word, word) for word in line.split()[2:]]
        right = [
            *told,
            "--quiet",
            "--no-tensorboard",
            "--threads=1",
            f"--state-dir={tmp_path}",
            f"--cache-dir={tmp_path}",
        ]
        for change in ("tokenizer", "weights"):
            with pytest.raises(ModelMismatch, match=f"the {change} of your copy .* nothing was sent"):
                join([*right, f"--model={another_copy(tmp_path / change, change)}"])
        wrong = ["flj-wrong" if word.startswith("flj-") else word for word in right]
        with pytest.raises(NotOwner, match=r"does not open the job.*--job-key"):
            join(wrong)
        assert "nobody" in log.read_text().splitlines()[-1]
        assert join(right) == 0
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "out" / "shared.safetensors").is_file()
    assert "done: step 2 of 2" in log.read_text()
