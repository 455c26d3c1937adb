from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from split_llama.errors import CacheError, CheckpointError, UsageError
from training.checkpoints import Checkpoints


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight/w": torch.full((5, 7), float(step)), "step": torch.tensor(float(step)), "none": torch.empty(0)}


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "job" / "a", "job 1, client a")


def save(kept: Checkpoints, *steps: int) -> None:
    for step in steps:
        kept.save(step, tensors(step), {"step": step, "names": ["x", "ü"]})


def files(kept: Checkpoints) -> list[str]:
    return sorted(file.name for file in kept._folder.iterdir())


def test_what_is_saved_is_loaded(kept: Checkpoints) -> None:
    save(kept, 3)
    loaded = kept.load(3)
    assert (loaded.step, loaded.meta) == (3, {"step": 3, "names": ["x", "ü"]})
    assert set(loaded.tensors) == set(tensors(3))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors(3).items())


def test_leaves_and_views_of_one_storage_are_saved_by_value(kept: Checkpoints) -> None:
    flat = torch.arange(12.0)
    views = {"a": flat[:6].view(2, 3).requires_grad_(True), "b": flat[6:].view(3, 2).t()}
    kept.save(1, views, {})
    assert kept.load(1).tensors["b"].tolist() == [[6, 8, 10], [7, 9, 11]]


def test_the_two_newest_are_kept(kept: Checkpoints) -> None:
    save(kept, 0, 5, 10, 15)
    assert kept.steps() == [10, 15]
    assert len(files(kept)) == 2


def test_a_step_may_be_saved_again(kept: Checkpoints) -> None:
    save(kept, 5, 10)
    kept.save(10, tensors(99), {})
    assert kept.steps() == [5, 10]
    assert float(kept.load(10).tensors["step"]) == 99


def test_later_steps_are_dropped_when_a_job_goes_back(kept: Checkpoints) -> None:
    save(kept, 5, 10)
    kept.drop_after(5)
    assert kept.steps() == [5]
    save(kept, 7)
    assert kept.steps() == [5, 7]
    kept.drop_after(0)
    assert kept.steps() == []


def test_a_torn_or_damaged_file_counts_as_absent(kept: Checkpoints) -> None:
    save(kept, 5, 10)
    file = kept._folder / "step-0000000010.safetensors"
    whole = file.read_bytes()
    for spoiled in (b"", whole[:4], whole[:100], whole[:-1], whole + b"x", whole[:-3] + b"abc", b"\xff" * 200):
        file.write_bytes(spoiled)
        assert kept.steps() == [5]
        with pytest.raises(CheckpointError, match="step-0000000010"):
            kept.load(10)
    save(kept, 10)
    assert kept.steps() == [5, 10]


def test_a_torn_file_takes_no_place_of_the_two(kept: Checkpoints) -> None:
    save(kept, 5, 10)
    (kept._folder / "step-0000000010.safetensors").write_bytes(b"torn")
    save(kept, 15)
    assert kept.steps() == [5, 15]


def test_a_foreign_file_is_skipped_and_left_alone(kept: Checkpoints, tmp_path: Path) -> None:
    save(kept, 5, 10)
    other = Checkpoints(kept._folder, "job 2, client a")
    assert other.steps() == []
    with pytest.raises(CheckpointError, match="no checkpoint of job 2, client a"):
        other.load(10)
    other.drop_after(0)
    save_file({"w": torch.ones(2)}, kept._folder / "step-0000000020.safetensors")
    save_file({"w": torch.ones(2)}, kept._folder / "step-0000000030.safetensors", {"fl_llama_checkpoint": "[1]"})
    (kept._folder / "notes.txt").write_text("mine")
    assert kept.steps() == [5, 10]
    save(kept, 15)
    assert kept.steps() == [10, 15]
    assert "notes.txt" in files(kept)
    assert "step-0000000020.safetensors" in files(kept)


def test_a_renamed_file_is_not_taken_for_another_step(kept: Checkpoints) -> None:
    save(kept, 5)
    (kept._folder / "step-0000000005.safetensors").rename(kept._folder / "step-0000000006.safetensors")
    assert kept.steps() == []


def test_a_missing_step_is_an_error(kept: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="step-0000000007"):
        kept.load(7)
    with pytest.raises(UsageError, match="got -1"):
        save(kept, -1)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_ones_intact(kept: Checkpoints) -> None:
    save(kept, 5, 10)
    with files_of_at_most(200), pytest.raises(CacheError, match=r"step 15 .* cannot be written .* make room"):
        save(kept, 15)
    assert kept.steps() == [5, 10]
    assert len(files(kept)) == 2
    save(kept, 15)
    assert kept.steps() == [10, 15]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CacheError, match="cannot be kept in"):
        Checkpoints(tmp_path / "job", "a")


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("")
    with pytest.raises(CacheError, match="cannot be kept in"):
        Checkpoints(tmp_path / "job", "a")


def test_a_process_killed_while_saving_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from training.checkpoints import Checkpoints
kept = Checkpoints(Path(sys.argv[1]), "a")
step = 0
while True:
    step += 1
    kept.save(step, {"w": torch.full((200_000,), float(step))}, {"step": step})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(4)]
    process.kill()
    process.wait()
    process.stdout.close()
    kept = Checkpoints(tmp_path, "a")
    steps = kept.steps()
    assert steps[-1] >= reported[-1]
    assert len(steps) >= 2
    for step in steps:
        loaded = kept.load(step)
        assert loaded.meta == {"step": step}
        assert torch.equal(loaded.tensors["w"], torch.full((200_000,), float(step)))
    assert not list(tmp_path.glob("*.new"))
