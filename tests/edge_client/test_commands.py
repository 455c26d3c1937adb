"""`edge-client` as a user runs it: processes, signals, servers that die or are none."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.edge_client.conftest import ServerProcess

MakeServer = Callable[..., ServerProcess]
EdgeClient = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def edge_client(tmp_path: Path) -> Iterator[EdgeClient]:
    """Start `edge-client` with folders of its own and without the user's settings."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FL_LLAMA_")}
    environ |= {
        "FL_LLAMA_EDGE_CACHE_DIR": str(tmp_path / "cache"),
        "FL_LLAMA_EDGE_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
    }
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, stdin: str | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edge_client", *arguments]
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        started.append(process)
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
            process.stdin = None
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


@pytest.fixture
def captive_portal() -> Iterator[str]:
    class Portal(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Please log in</html>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Portal) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_help_is_quick_and_light(edge_client: EdgeClient) -> None:
    script = (
        "import sys; from edge_client.cli import main\ntry: main(['generate', '--help'])\nfinally: print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--max-new-tokens" in out
    loaded = set(out.split())
    assert not loaded & {"torch", "numpy", "pydantic", "httpx", "tokenizers", "platformdirs"}


def test_config_tells_where_values_come_from(edge_client: EdgeClient, tmp_path: Path) -> None:
    (tmp_path / "config" / "fl-llama").mkdir(parents=True)
    (tmp_path / "config" / "fl-llama" / "config.toml").write_text('[edge]\ncodec = "int8"\napi_key = "hush"\n')
    code, out, err = finish(edge_client("config", "--noise", "0.5"))
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["noise"].split()[1:] == ["0.5", "--noise"]
    assert "int8" in lines["codec"]
    assert "config.toml [edge]" in lines["codec"]
    assert "FL_LLAMA_EDGE_CACHE_DIR" in lines["cache_dir"]
    assert lines["top_k"].endswith("default")
    assert "hush" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "--prompt", "x"], 2, "which server?"),
        (["generate", "--prompt", "x", "--server", "nonsense"], 2, "http://"),
        (["generate", "--prompt", "x", "--server", "http://127.0.0.1:1", "--codec", "fp12"], 2, "did you mean"),
        (["generate", "--prompt", "x", "--server", "http://127.0.0.1:1", "--system", "y"], 2, "--chat"),
        (["generate", "--prompt", "x", "--server", "http://127.0.0.1:1", "--partition", "0,1"], 2, "embeddings"),
        (["generate", "--prompt", "x", "--server", "http://127.0.0.1:1"], 3, "nothing listens there"),
        (["generate", "--server", "http://127.0.0.1:1"], 2, "--prompt"),
        (["generate", "--prom", "x"], 2, "--prom"),
    ],
)
def test_mistakes_and_their_exit_codes(edge_client: EdgeClient, arguments: list[str], code: int, message: str) -> None:
    found, out, err = finish(edge_client(*arguments))
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_captive_portal_is_no_server(edge_client: EdgeClient, captive_portal: str) -> None:
    code, out, err = finish(edge_client("generate", "--server", captive_portal, "--prompt", "x"))
    assert (code, out) == (3, "")
    assert "web page" in err
    assert "Traceback" not in err


def test_killed_server_interrupted_user_and_the_outputs(
    edge_client: EdgeClient, server_process: MakeServer, tiny_checkpoint: Any
) -> None:
    """One server for several checks: starting one takes seconds."""
    folder = tiny_checkpoint(max_positions=2048, overrides={"eos_token_id": None})
    server = server_process(folder)
    server.start()
    common = ["generate", "--server", server.url, "--noise", "0", "--codec", "fp32", "--max-new-tokens"]

    code, text, err = finish(edge_client(*common, "400", "--prompt", "Tom is"))
    assert code == 0
    assert text.endswith("\n")
    assert "round trips" in err
    code, out, err = finish(edge_client(*common, "400", "--prompt", "-", "--json", "--quiet", stdin="Tom is"))
    report = json.loads(out)
    # A random model says "\r" too, which reading the other output as text has turned into a line's end.
    said = report["text"].replace("\r\n", "\n").replace("\r", "\n")
    assert (code, err, said + "\n") == (0, "", text)
    assert report["completion_tokens"] == len(report["token_ids"]) == 400
    assert len(report["itl_ms"]) == 399
    assert report["finish_reason"] == "length"
    assert (report["partition"], report["noise_sigma"]) == ("1,1", 0.0)

    process = edge_client(*common, "2000", "--prompt", "Tom is")
    wait_for(lambda: [session for session in server.sessions() if session["length"] > 50])
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert out
    assert out.startswith(text[:20])
    assert "Traceback" not in err
    assert server.sessions() == []

    process = edge_client(*common, "400", "--prompt", "Tom is")
    wait_for(lambda: [session for session in server.sessions() if session["length"] > 50])
    server.kill()
    server.start()
    code, out, err = finish(process)
    assert (code, out) == (0, text), err
