"""`edge-client` as a process, with folders of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


RunEdge = Callable[..., Done]


@pytest.fixture
def run_edge(tmp_path: Path) -> RunEdge:
    """Run `edge-client ...` to its end, without the user's settings."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FL_LLAMA_")}
    environ |= {
        "FL_LLAMA_EDGE_CACHE_DIR": str(tmp_path / "cache"),
        "FL_LLAMA_EDGE_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> Done:
        command = [sys.executable, "-m", "edge_client", *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", timeout=120)
        return Done(done.returncode, done.stdout, done.stderr)

    return run
