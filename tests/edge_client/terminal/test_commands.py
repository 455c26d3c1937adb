"""What a line means, and what is saved."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from edge_client.terminal import saved
from edge_client.terminal.commands import COMMANDS, Called, help_text, is_open_quote, read_line
from edge_client.terminal.conversation import Conversation, Exchange
from split_llama.errors import UsageError


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("hello\n", "hello"),
        ("  two\n lines ", "two\n lines"),
        ("/help", Called("help", "")),
        ("/?", Called("help", "")),
        ("/exit", Called("quit", "")),
        ("/SYSTEM  be brief, please ", Called("system", "be brief, please")),
        ("/system", Called("system", "")),
        ("/partition 2, 1", Called("partition", "2, 1")),
        ("//etc/passwd is a file", "/etc/passwd is a file"),
        ('"""\n/new\nis no command here\n"""', "/new\nis no command here"),
        ("", ""),
    ],
)
def test_lines(text: str, meaning: object) -> None:
    assert read_line(text) == meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/partion 1,1", "no command /partion; did you mean /partition?"),
        ("/xyzzy", "no command /xyzzy; /help lists them"),
        ("/", "no command /; /help"),
        ("/noise", "/noise needs SIGMA"),
        ("/new one", "/new takes nothing, 'one' came"),
    ],
)
def test_mistakes_name_what_was_meant(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        read_line(text)


def test_help_has_every_command() -> None:
    assert all(f"/{command.name}" in help_text() for command in COMMANDS)


def test_quotes_wait_for_their_end() -> None:
    assert is_open_quote('"""a\nb')
    assert is_open_quote('"""')
    assert not is_open_quote('"""a\nb"""')
    assert not is_open_quote('a """ b')


def test_a_conversation_is_saved_for_its_owner_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = Conversation("be brief", [Exchange("Wörter 🐈", "ja", stopped=True), Exchange("b", "c")])
    assert saved.save(conversation, str(path), "demo") == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert saved.load(str(path)) == conversation
    saved.save(Conversation(None, []), str(path), "demo")
    assert saved.load(str(path)) == Conversation(None, [])


def test_saving_spares_other_files(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UsageError, match=r"no conversation that /save wrote"):
        saved.save(Conversation(), str(notes), "demo")
    assert notes.read_text() == "mine"
    with pytest.raises(UsageError, match="cannot write"):
        saved.save(Conversation(), str(tmp_path / "none" / "chat.json"), "demo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "no conversation"),
        ({"messages": [{"role": "user", "content": "a"}]}, "in turns"),
        ({"messages": [{"role": "user", "content": 3}]}, "role and content"),
        ({"messages": "a"}, "role and content"),
        ({"stopped": []}, "in turns"),
        ({"stopped": ["no"]}, "true and false"),
    ],
)
def test_files_that_are_no_conversation(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "chat.json"
    saved.save(Conversation(None, [Exchange("a", "b")]), str(path), "demo")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=message):
        saved.load(str(path))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        saved.load(str(tmp_path / "none.json"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no conversation"):
        saved.load(str(tmp_path / "binary"))
