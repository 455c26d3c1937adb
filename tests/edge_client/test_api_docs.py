"""Every snippet of docs/python-api.md runs as it stands there, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import live_server

from split_llama.demo import demo_model_path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8700"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(demo_model_path(), "--dtype", "float32") as url:
        yield url


def test_the_page_has_snippets() -> None:
    assert len(SNIPPETS) == 5
    assert sum(ADDRESS in snippet for snippet in SNIPPETS) == 4


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number: int, url: str, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number].replace(ADDRESS, url), encoding="utf-8")
    folders = {"FL_LLAMA_EDGE_CACHE_DIR": str(tmp_path / "cache"), "FL_LLAMA_EDGE_STATE_DIR": str(tmp_path / "state")}
    # The async snippet makes its settings itself, and so keeps its state where the user's is.
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    root = {"PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=os.environ | folders | home | root,
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert bool(done.stdout) is (ADDRESS in SNIPPETS[number])
