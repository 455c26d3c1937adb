"""Fixtures that every package's tests share."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, write_model


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tiny tensors gain nothing from threads, and on a busy machine their waiting costs thirty times the work."""
    torch.set_num_threads(1)


TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared test data: $FL_LLAMA_DATA, or ../shared/data beside the repository; skips where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FL_LLAMA_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data: set FL_LLAMA_DATA or put it in {beside}")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """A factory of tiny checkpoints: `tiny_checkpoint(family="qwen2", shards=3, dtype=torch.bfloat16)` gives a folder.

    The keywords are the fields of `tiny_models.TinyModel`; each call writes a new folder.
    """
    written: list[Path] = []

    def write(**geometry: Any) -> Path:
        folder = tmp_path / f"tiny-{len(written)}"
        written.append(write_model(folder, TinyModel(**geometry)))
        return folder

    return write


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail a run of the whole suite that collects fewer tests than pyproject.toml says there are."""
    config = session.config
    narrowed = config.option.keyword or config.option.markexpr not in ("", "not slow") or config.option.deselect
    if narrowed or config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.lf:
        return
    pyproject = tomllib.loads((config.rootpath / "pyproject.toml").read_text(encoding="utf-8"))
    expected = pyproject["tool"]["fl-llama"]["collects-at-least"]
    if len(session.items) < expected:
        raise pytest.UsageError(
            f"{len(session.items)} tests were collected, at least {expected} were expected. Find what is no longer "
            "collected; if tests went on purpose, lower collects-at-least in pyproject.toml"
        )
