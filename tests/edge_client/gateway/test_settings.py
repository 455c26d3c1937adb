"""The gateway's settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge_client.gateway.settings import GatewaySettings
from edge_client.settings import EdgeSettings
from split_llama.errors import UsageError


def test_flags_do_not_collide_with_the_edges() -> None:
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (EdgeSettings, GatewaySettings)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    GatewaySettings(host=host).check()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "gateway.example"])
def test_other_addresses_do(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--gateway-key"):
        GatewaySettings(host=host).check()
    GatewaySettings(host=host, gateway_key="secret").check()
    file = tmp_path / "keys"
    file.write_text("# mine\none  # of Anna\n\ntwo\n")
    settings = GatewaySettings(host=host, gateway_key_file=file, gateway_key="one")
    settings.check()
    assert settings.keys() == ("one", "two")


def test_key_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        GatewaySettings(gateway_key_file=tmp_path / "none").keys()
    file = tmp_path / "keys"
    file.write_text("# nothing\n")
    with pytest.raises(UsageError, match="no key"):
        GatewaySettings(gateway_key_file=file).keys()
    for wrong in ("", "a b", "schlüssel"):
        with pytest.raises(UsageError, match="ASCII"):
            GatewaySettings(gateway_key=wrong).keys()


def test_an_origin_has_a_scheme() -> None:
    GatewaySettings(allowed_origins=("https://chat.example", "*")).check()
    with pytest.raises(UsageError, match="such as https"):
        GatewaySettings(allowed_origins=("chat.example",)).check()
