"""The chat's commands: what they are called, what they take, and which one a line means. Pure text."""

from __future__ import annotations

from dataclasses import dataclass

from split_llama.errors import UsageError
from split_llama.settings import closest

QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Command:
    """One command as `/help` shows it. `optional` says whether it may stand without its argument."""

    name: str
    argument: str
    purpose: str
    optional: bool = False


COMMANDS = (
    Command("help", "", "show this"),
    Command("new", "", "forget this conversation and begin another; the system message stays"),
    Command("system", "TEXT", "set the system message, or show it; 'none' removes it", optional=True),
    Command("partition", "P,Q", "keep other blocks here: a second release of the conversation under other noise"),
    Command("noise", "SIGMA", "set the noise: a second release of the conversation under other noise"),
    Command("speculate", "auto|off|N", "guess tokens ahead; the text stays the same"),
    Command("stats", "", "show what the last answer and the whole chat came to"),
    Command("save", "FILE", "write the conversation's text into a file"),
    Command("load", "FILE", "go on with a conversation saved before"),
    Command("retry", "", "ask for another answer to the last message"),
    Command("undo", "", "take the last message and its answer back"),
    Command("quit", "", "leave"),
)
ALSO = {"exit": "quit", "?": "help"}


@dataclass(frozen=True, slots=True)
class Called:
    """A command with what was given to it."""

    name: str
    argument: str


def read_line(text: str) -> Called | str:
    """Read what the user gave: a command, or a message with its quotes taken off (empty: nothing to send).

    A message that begins with a slash is written with two. Raises `UsageError` for an unknown command or a wrong use.
    """
    text = text.strip()
    if text.startswith(QUOTES):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    if text.startswith("//"):
        return text[1:]
    return _read_command(text[1:]) if text.startswith("/") else text


def _read_command(text: str) -> Called:
    word, *rest = text.split(maxsplit=1) or [""]
    argument = rest[0] if rest else ""
    known = {command.name: command for command in COMMANDS}
    name = ALSO.get(word.lower(), word.lower())
    if name not in known:
        hint = closest(name, known) or "; /help lists them"
        raise UsageError(f"there is no command /{word}{hint.replace(chr(39), '/', 1).replace(chr(39), '')}")
    command = known[name]
    if argument and not command.argument:
        raise UsageError(f"/{name} takes nothing, {argument!r} came; a message that begins with / is written with //")
    if command.argument and not argument and not command.optional:
        raise UsageError(f"/{name} needs {command.argument}: it is to {command.purpose}")
    return Called(name, argument)


def is_open_quote(text: str) -> bool:
    '''Say whether a block begun with """ still waits for its end.'''
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def help_text() -> str:
    """Give the list of commands."""
    rows = [(f"/{command.name} {command.argument}".strip(), command.purpose) for command in COMMANDS]
    width = max(len(usage) for usage, _ in rows)
    lines = [f"  {usage:<{width}}  {purpose}" for usage, purpose in rows]
    keys = (
        "Enter sends, Alt-Enter (or Esc, then Enter) begins a new line; pasted blocks stay whole, and so does what "
        'stands between """ and """.\nCtrl-C stops an answer; at an empty prompt it leaves, as Ctrl-D does.'
    )
    return "\n".join([*lines, keys])
