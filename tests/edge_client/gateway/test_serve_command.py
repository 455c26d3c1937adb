"""`edge-client serve` as a process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import TinyCheckpoint
from tests.edge_client.conftest import ServerProcess

READY = re.compile(r"ready: chat at (http://\S+),")


@contextmanager
def gateway(server: str, folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    fixed = ["--port", "0", "--noise", "0", "--device", "cpu", "--threads", "1"]
    folders = ["--cache-dir", str(folder / "cache"), "--state-dir", str(folder / "state")]
    command = [sys.executable, "-m", "edge_client", "serve", "--server", server, *fixed, *folders, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if match := READY.search(line):
                break
        else:
            raise AssertionError("".join(said))
        yield match[1], process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_and_an_orderly_end(
    number: signal.Signals,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    server_process: Callable[..., ServerProcess],
) -> None:
    server = server_process(tiny_checkpoint(max_positions=4096))
    server.start()
    with gateway(server.url, tmp_path, "--served-model-name", "small") as (url, process):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
            answer = client.chat.completions.create(
                model="small", messages=[{"role": "user", "content": "dabada"}], max_tokens=5
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens <= 5
            assert len(server.sessions()) == 1
            stream = client.completions.create(
                model="small", prompt="kilo", max_tokens=100_000, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            process.send_signal(number)
            assert process.wait(timeout=30) == 0
        assert server.sessions() == [], "nothing is left on the server"


def test_wrong_use_is_told_at_once(tmp_path: Path) -> None:
    def run(*flags: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "edge_client", "serve", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    code, said = run("--server", "http://127.0.0.1:9", "--host", "0.0.0.0")
    assert (code, "--gateway-key" in said) == (2, True)
    code, said = run()
    assert (code, "--server" in said) == (2, True)
    code, said = run("--server", "http://127.0.0.1:9", "--reconnect-seconds", "0")
    assert code == 3
    help_text = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "edge_client", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--gateway-key-file" in help_text.stdout
    assert not re.search(r"\| +(torch|fastapi|llguidance)$", help_text.stderr, re.MULTILINE)


def test_an_address_that_is_taken(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, server_process: Callable[..., ServerProcess]
) -> None:
    server = server_process(tiny_checkpoint())
    server.start()
    taken = ["--server", server.url, "--port", str(server.port)]
    folders = ["--cache-dir", str(tmp_path / "cache"), "--state-dir", str(tmp_path / "state")]
    command = [sys.executable, "-m", "edge_client", "serve", *taken, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
    assert httpx.get(f"{server.url}/readyz").status_code == 200
