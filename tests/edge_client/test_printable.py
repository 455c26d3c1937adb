"""Control characters of models and servers do not reach a terminal."""

from __future__ import annotations

import argparse
import io

import pytest

from edge_client.cli import main
from edge_client.printable import for_stream, printable
from split_llama.errors import RemoteError


def test_text_stays_and_orders_do_not() -> None:
    assert printable("übel 猫\n\tend") == "übel 猫\n\tend"
    controls = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
    assert set(printable(controls)) == {"\n", "\t", "\ufffd"}
    assert printable("a\r\nb") == "a\nb"


def test_a_pipe_gets_every_byte() -> None:
    assert for_stream("a\x1b[2J\r", io.StringIO()) == "a\x1b[2J\r"


def test_a_servers_error_is_no_order_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_arguments: argparse.Namespace) -> int:
        raise RemoteError("no: \x1b]52;c;eA==\x07\x9b2J")

    monkeypatch.setattr("edge_client.commands.generate.run", fail)
    assert main(["generate", "--prompt", "x"]) == RemoteError.exit_code
    assert capsys.readouterr().err == "edge-client: no: \ufffd]52;c;eA==\ufffd\ufffd2J\n"
