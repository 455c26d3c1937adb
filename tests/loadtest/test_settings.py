from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from edge_client.settings import EdgeSettings
from loadtest.settings import DEFAULT_REQUESTS, SECTION, LoadSettings, is_loopback
from split_llama.errors import UsageError
from split_llama.settings import load_settings
from split_llama.transport.address import ServerAddress

HERE = "http://127.0.0.1:8700"


@pytest.mark.parametrize(
    ("url", "here"),
    [
        (HERE, True),
        ("http://127.9.9.9", True),
        ("http://localhost:1/x", True),
        ("https://LOCALHOST", True),
        ("ws://[::1]:8700", True),
        ("http://[::1]", True),
        ("http://10.0.0.1:8700", False),
        ("http://example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://localhost.example.org:80", False),
        ("http://[2001:db8::1]:8700", False),
        ("http://0.0.0.0:8700", False),
    ],
)
def test_only_this_machine_is_loaded_unasked(url: str, here: bool) -> None:
    assert is_loopback(ServerAddress.parse(url)) is here
    if here:
        LoadSettings(server=url).validate()
    else:
        with pytest.raises(UsageError, match=r"an attack on it.*--allow-remote"):
            LoadSettings(server=url).validate()
        LoadSettings(server=url, allow_remote=True).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": None}, "which server"),
        ({"processes": 3, "clients": 2}, "at least one"),
        ({"prompts": Path("x"), "prompt_tokens": "3"}, "--prompts takes the lengths"),
        ({"json": "/no/such/folder/x.json"}, "no such folder"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(LoadSettings(server=HERE), **changes).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flag", ["clients", "requests", "duration", "max_new_tokens", "prompt_tokens", "request_timeout"]
)
def test_zero_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')}"):
        load_settings(LoadSettings, SECTION, {flag: "0"}, environ={"XDG_CONFIG_HOME": "/nowhere"})


def test_a_run_is_always_bounded() -> None:
    assert LoadSettings().num_requests() == DEFAULT_REQUESTS
    assert LoadSettings(duration=3.0).num_requests() is None
    assert LoadSettings(duration=3.0, requests=5).num_requests() == 5


def test_the_edge_gets_what_it_knows() -> None:
    settings = LoadSettings(server=HERE, codec="int8", partition="2,1", threads=3, seed=9, max_new_tokens="4")
    edge = settings.edge()
    assert (edge.server, edge.codec, edge.partition, edge.threads) == (HERE, "int8", "2,1", 3)
    assert edge.seed is None
    assert edge.max_new_tokens == EdgeSettings().max_new_tokens


def test_settings_travel_to_another_process() -> None:
    settings = LoadSettings(server=HERE, api_key="s3cret", prompts=Path("p.txt"), cache_dir=Path("c"), duration=1.5)
    assert LoadSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert "s3cret" not in json.dumps(settings.shown())
