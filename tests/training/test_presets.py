"""The presets of the paper's tables are run files that parse, with the paper's figures in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import training
from split_llama.errors import CheckpointError, UsageError
from split_llama.hub import resolve_model
from training.run_file import RunFile
from training.tasks.readers import task_names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reproduce.md"
FOLDER = Path(training.__file__).parent / "paper"
PRESETS = {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}
# r, alpha, learning rate, as the paper tuned them; of ReCoRD only its timing table, where no rate is given.
PAPER = {"coqa": (4, 32.0, 1e-4), "xsum": (16, 32.0, 3e-5), "multirc": (32, 32.0, 1e-5), "record": (8, 16.0, None)}


def test_there_is_one_for_each_of_the_papers_tasks() -> None:
    assert set(PRESETS) == set(PAPER)


def given(name: str, *more: str) -> RunFile:
    """The preset as docs/reproduce.md uses it."""
    return RunFile.read(str(PRESETS[name]), ["server.model=MODEL", "data.train=train.jsonl", *more])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_papers_settings(name: str) -> None:
    file = given(name)
    job = file.job
    r, alpha, lr = PAPER[name]
    assert (job.lora.r, job.lora.alpha, job.lora.target_modules) == (r, alpha, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert lr is None or job.optimizer.lr == lr
    assert (job.shared, job.partition) == ("A,B,C", "1,1")
    assert file.data.task == name
    assert file.data.task in task_names()
    assert file.client == {"noise": "mean-abs=0.02"}
    assert file.server["model"] == "MODEL"
    assert file.server["allowed_partitions"] == job.partition


@pytest.mark.parametrize("name", PRESETS)
def test_model_and_data_are_the_users_to_give(name: str) -> None:
    with pytest.raises(UsageError, match="which data"):
        RunFile.read(str(PRESETS[name]))
    # Without one split-server refuses to start: it must not be the bundled model by accident.
    assert RunFile.read(str(PRESETS[name]), ["data.train=train.jsonl"]).server["model"] == ""
    with pytest.raises(CheckpointError, match="MODEL is empty"):
        resolve_model("")


def test_the_noise_axis_is_read_at_the_papers_step() -> None:
    file = given("multirc", "job.partition=2,1", "client.noise=mean-abs=0.05")
    assert (file.job.steps, file.job.partition, file.client["noise"]) == (5000, "2,1", "mean-abs=0.05")
    assert file.server["allowed_partitions"] == "2,1"


COMMANDS = re.findall(r"^\$RUN (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_row_of_the_timing_table_sees_a_thousand_samples(command: str) -> None:
    changes = [word for word in command.split() if word != "--set"]
    job = given("record", *changes).job
    at_once = 1 if job.strategy == "sequential" else job.clients
    assert job.steps * job.batch_size * job.accumulate * at_once == 1000


def test_the_page_has_the_papers_rows() -> None:
    rows = [(given("record", *command.replace("--set ", " ").split()).job) for command in COMMANDS]
    found = [(job.strategy, job.clients) for job in rows]
    assert found == [
        ("sequential", 2),
        *(("client-batch", clients) for clients in (2, 4, 8)),
        *(("server-hierarchical", clients) for clients in (2, 4, 8)),
    ]
    for name in PRESETS:
        assert f"paper/{name}" in PAGE.read_text(encoding="utf-8") or f"`{name}.toml`" in PAGE.read_text(
            encoding="utf-8"
        )
