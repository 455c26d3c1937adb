"""The command line and the settings behind it: what cannot work is said before anything starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.cli import main
from serving.settings import ServerSettings
from split_llama.errors import UsageError
from split_llama.settings import load_settings


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    yield
    for name in ("fl_llama", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["/nowhere/at/all"], 4, "nowhere"),
        (["{model}", "--model", "{model}"], 2, "twice"),
        (["{model}", "--allowed-partitions", "4,4"], 2, "partition"),
        (["{model}", "--max-model-len", "100000"], 2, "256"),
        (["{model}", "--max-num-seqs", "0"], 2, "above 0"),
        (["{model}", "--gpu-memory-utilization", "0.000000001"], 4, "MiB"),
        (["{model}", "--ssl-certfile", "/nowhere.pem"], 2, "go together"),
        (["{model}", "--ssl-certfile", "{model}/config.json", "--ssl-keyfile", "{model}/config.json"], 2, "TLS"),
        (["{model}", "--host", "203.0.113.7"], 2, "cannot listen"),
        (["{model}", "--dtype", "fp61"], 2, "fp16"),
        (["{model}", "--api-key-file", "{model}/config.json"], 2, "key file"),
    ],
)
def test_what_cannot_work_is_said_before_it_starts(
    model_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, word: str
) -> None:
    filled = [argument.format(model=model_folder) for argument in arguments]
    assert main(["--port", "0", *filled]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert word in shown.err
    assert "Traceback" not in shown.err


def test_an_unknown_flag_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--prot", "1"])
    assert stopped.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_a_public_address_without_a_key_is_warned_about(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(model_folder), "--host", "0.0.0.0", "--port", "0", "--max-model-len", "9999"])
    assert "NO API KEY" in capsys.readouterr().err
    main([str(model_folder), "--host", "0.0.0.0", "--port", "0", "--max-model-len", "9999", "--api-key", "k"])
    assert "NO API KEY" not in capsys.readouterr().err


def test_help_lists_the_promised_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for flag in (
        "model host port device dtype allowed-partitions max-model-len max-num-seqs max-num-batched-tokens "
        "gpu-memory-utilization kv-cache-dtype served-model-name api-key api-key-file ssl-certfile ssl-keyfile "
        "ssl-ca-certs root-path log-level threads"
    ).split():
        assert f"--{flag} " in shown


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--api-key-file", str(tmp_path / "keys.json")]
    assert main(["keys", "create", "alice", "--max-sessions", "3", *file]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("flk-")
    assert main(["keys", "list", *file]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed
    assert "max_sessions=3" in listed
    assert key not in listed
    assert key not in (tmp_path / "keys.json").read_text()
    assert main(["keys", "create", "alice", *file]) == 2
    assert main(["keys", "revoke", "alcie", *file]) == 2
    assert "did you mean 'alice'" in capsys.readouterr().err
    assert main(["keys", "revoke", "alice", *file]) == 0
    assert main(["keys", "list", *file]) == 0
    assert capsys.readouterr().out == ""


def test_settings_come_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fl-llama").mkdir()
    (tmp_path / "fl-llama" / "config.toml").write_text('[server]\nport = 1234\nhost = "::1"\n')
    monkeypatch.setenv("FL_LLAMA_SERVER_PORT", "4321")
    settings = load_settings(ServerSettings, "server").settings
    assert (settings.port, settings.host, settings.is_loopback) == (4321, "::1", True)
    monkeypatch.setenv("FL_LLAMA_SERVER_PROT", "1")
    with pytest.raises(UsageError, match="FL_LLAMA_SERVER_PORT"):
        load_settings(ServerSettings, "server")
    assert not ServerSettings(host="0.0.0.0").is_loopback
    assert ServerSettings(host="localhost").is_loopback
