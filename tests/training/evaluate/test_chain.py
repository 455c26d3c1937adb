"""The whole chain, as the README has it: a run of two clients, its export, its evaluation in plain PEFT and split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.cli import main


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "client"), [("A,B,C", []), ("B", ["--client", "1"])])
def test_run_export_evaluate(
    shared: str,
    client: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for section in ("TRAIN", "EDGE"):
        monkeypatch.setenv(f"FL_LLAMA_{section}_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv(f"FL_LLAMA_{section}_CACHE_DIR", str(tmp_path / "cache"))
    run, merged = tmp_path / "run", tmp_path / "merged"
    changes = [f"out={run}", f"job.shared={shared}", "job.steps=20", "job.batch_size=4", "client.noise=0"]
    assert main(["run", "demo", *(word for change in changes for word in ("--set", change))]) == 0
    assert main(["export", str(run), *client, "--out", str(merged)]) == 0
    capsys.readouterr()
    flags = ["--model", "demo", "--adapter", str(merged), "--task", "demo", "--limit", "40", "--codec", "fp32"]
    assert main(["evaluate", *flags, "--json", "--quiet", "--threads", "1"]) == 0
    base, adapted, split = json.loads(capsys.readouterr().out)["rows"]
    assert split["scores"] == adapted["scores"] != base["scores"]
