"""The file of a run: what it says, what it may not say, and what becomes of it on command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from split_llama.errors import UsageError
from training.client.jobs import JobKey
from training.run_file import EXAMPLES, RunData, RunFile, as_flags, find
from training.site import Site

SMALLEST = {"data": {"task": "demo"}}


def parse(**tables: Any) -> RunFile:
    return RunFile.parse(SMALLEST | tables, "run.toml")


def test_little_is_needed() -> None:
    file = parse()
    assert file.out == Path("runs/job")
    assert file.job.clients == 2
    assert file.data.train == ()
    assert "--model=demo" in file.server_flags()
    assert "--extension=training" in file.server_flags()
    assert file.client == {}


def test_the_server_hosts_what_the_job_needs() -> None:
    assert "--allowed-partitions=2,1" in parse(job={"partition": "2,1"}).server_flags()
    file = parse(server={"model": "m", "extension": "other", "allowed-partitions": "1,1", "lora-modules": ["a=b"]})
    assert file.server_flags() == [
        "--model=m",
        "--allowed-partitions=1,1",
        "--lora-modules=a=b",
        "--extension=other",
        "--extension=training",
    ]


def test_flags_are_spelled_as_command_lines_have_them() -> None:
    values = {"noise": "0", "tensorboard": False, "accept_new_weights": True, "threads": 2, "clip": "-1"}
    assert as_flags(values) == ["--noise=0", "--no-tensorboard", "--accept-new-weights", "--threads=2", "--clip=-1"]


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"jobs": {}}, "unknown section or key 'jobs'; did you mean 'job'"),
        ({"job": 3}, r"expected a section \[job\]"),
        ({"job": {"stpes": 3}}, "did you mean 'steps'"),
        ({"job": {"lora": {"rank": 3}}}, "lora.rank"),
        ({"data": {"task": "demo", "partitoin": "iid"}}, "did you mean 'partition'"),
        ({"data": {"task": "multirc"}}, "which data"),
        ({"data": {"train": ["a", "b", "c"]}}, "3 files for 2 clients"),
        ({"data": {"train": 3}}, "train is a file"),
        ({"data": {"task": 3}}, "are texts"),
        ({"client": {"gradient_nosie": 1}}, "did you mean 'gradient_noise'"),
        ({"client": {"noise": "loud"}}, "noise"),
        ({"client": {"server": "http://a"}}, "unknown key 'server'"),
        ({"server": {"model": {"a": 1}}}, "got a table"),
        ({"out": 3}, "path of a folder"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(**tables)


def test_demo_data_may_be_asked_for_by_its_name() -> None:
    assert parse(data={"train": "demo"}).data.task == "demo"


def test_entries_are_changed_by_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntask = "demo"\n[job]\nsteps = 3\n')
    changes = ["job.steps=7", "job.partition=2,1", "job.lora.r=4", "out=there", "client.noise=mean-abs=0.1"]
    file = RunFile.read(str(path), changes)
    assert (file.job.steps, file.job.partition, file.job.lora.r) == (7, "2,1", 4)
    assert file.out == Path("there")
    assert file.client == {"noise": "mean-abs=0.1"}


@pytest.mark.parametrize("change", ["job.steps", "=3", "job.steps.more=3"])
def test_a_change_that_is_none_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntask = "demo"\n[job]\nsteps = 3\n')
    with pytest.raises(UsageError, match="--set"):
        RunFile.read(str(path), [change])


def test_a_file_that_is_not_there_or_no_toml_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="those that come along: demo"):
        RunFile.read("nothing")
    (tmp_path / "bad.toml").write_text("[job\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        RunFile.read(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.toml")], ids=lambda path: path.stem)
def test_what_comes_along_can_be_read(path: Path) -> None:
    assert RunFile.read(path.stem).job.name == path.stem


def test_files_that_come_along_are_found_by_name() -> None:
    assert find("demo").name == "demo.toml"
    assert find("paper/multirc").name == "multirc.toml"
    with pytest.raises(UsageError, match="paper/record"):
        find("paper/nothing")


def test_who_makes_a_job_for_others_needs_no_data(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[job]\nsteps = 3\n")
    assert RunFile.read(str(path), required=()).data == RunData()
    with pytest.raises(UsageError, match="which data"):
        RunFile.read(str(path))


def test_a_strategy_of_ones_own_is_allowed_on_the_server_that_is_started_for_it() -> None:
    named = "somewhere:Else"
    file = RunFile.parse({"job": {"strategy": named}, "data": {"task": "demo"}}, "it")
    assert f"--extension-plugin={named}" in file.server_flags()
    assert not [flag for flag in RunFile.parse({"data": {"task": "demo"}}, "it").server_flags() if "plugin" in flag]


def test_a_strategy_of_ones_own_is_allowed_at_the_clients_that_are_started_for_it() -> None:
    named = "somewhere:Else"
    file = parse(job={"strategy": named})
    assert f"--strategy-plugin={named}" in Site(file, "http://a:1", JobKey("j", "k")).client_command(0)
    assert not [word for word in Site(parse(), "http://a:1", JobKey("j", "k")).client_command(0) if "plugin" in word]
