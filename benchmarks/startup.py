"""How long a user waits: `edge-client --help`, a server that is ready, the first token of the demo model.

    python -m benchmarks.startup [--rounds 5]

Wall-clock of whole processes. The first token counts from the start of the command, with the edge's weights fetched
before (warm) and in the same command (cold).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import free_port, record, running_server, spread, wait_until_ready

EDGE = [sys.executable, "-m", "edge_client"]
PROMPT = "Once upon a time, Emma and Ben had a busy day."


def seconds_of(command: list[str]) -> float:
    """Run a command to its end."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def seconds_to_ready() -> float:
    """Start a server for the demo model, wait for /readyz, stop it."""
    port = free_port()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.cli", "demo", "--port", str(port), "--log-level", "warning"]
    )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, 60)
        return time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait(timeout=30)


def seconds_to_first_text(url: str, home: Path) -> float:
    """Run `edge-client generate` and wait for the first byte of text."""
    environment = os.environ | {
        "FL_LLAMA_EDGE_CACHE_DIR": str(home / "cache"),
        "FL_LLAMA_EDGE_STATE_DIR": str(home / "state"),
    }
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*EDGE, "generate", "--server", url, "--prompt", PROMPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    process.wait(timeout=60)
    return seconds


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, list[float]] = {
        name: [] for name in ("help", "server_ready", "first_token_cold", "first_token_warm")
    }
    with running_server("demo") as url:
        for _ in range(options.rounds):
            figures["help"].append(seconds_of([*EDGE, "--help"]))
            figures["server_ready"].append(seconds_to_ready())
            with tempfile.TemporaryDirectory() as home:
                figures["first_token_cold"].append(seconds_to_first_text(url, Path(home)))
                figures["first_token_warm"].append(seconds_to_first_text(url, Path(home)))
    shown: dict[str, Any] = {name: spread(values) for name, values in figures.items()}
    for name, values in shown.items():
        print(name, {key: round(value, 2) for key, value in values.items()})
    record("startup", {"rounds": options.rounds, "seconds": shown})


if __name__ == "__main__":
    main()
