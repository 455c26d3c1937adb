"""A command whose packages are not installed says which extra brings them."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "arguments", "package", "extra"),
    [
        ("serving", ["demo"], "uvicorn", "server"),
        ("loadtest", ["run", "--server", "http://127.0.0.1:1"], "prometheus_client", "loadtest"),
        ("training", ["demo", "--help"], "transformers", "train"),
    ],
)
def test_the_extra_is_named(module: str, arguments: list[str], package: str, extra: str) -> None:
    # `None` in sys.modules is Python's own way to say that a module cannot be imported.
    program = (
        f"import sys; sys.modules[{package!r}] = None; from {module}.cli import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert package in done.stderr
    assert f"fl-llama[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr
