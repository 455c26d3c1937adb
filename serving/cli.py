"""`split-server`: serve a model, or manage API keys. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from serving.keys import KeyFile, default_key_file
from serving.limits import Limits
from serving.settings import SECTION, ServerSettings
from split_llama.errors import FlLlamaError, UsageError
from split_llama.extras import needs_extra
from split_llama.settings import add_flags, load_settings

KEYS = "keys"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0 done, 2 wrong usage, 3 refused or unreachable, 4 unusable model."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _keys(arguments[1:]) if arguments[:1] == [KEYS] else _serve(arguments)
    except FlLlamaError as error:
        print(f"split-server: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _serve(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="split-server",
        description="Host the middle blocks of a model for edge clients. `split-server keys --help` manages API keys.",
        epilog="Each flag can also be set as FL_LLAMA_SERVER_NAME or in ~/.config/fl-llama/config.toml under [server].",
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    add_flags(parser, ServerSettings)
    values = vars(parser.parse_args(arguments))
    positional = values.pop("positional_model")
    if positional is not None and values["model"] is not None:
        raise UsageError("MODEL was given twice, by position and by --model")
    values["model"] = positional if positional is not None else values["model"]
    settings = load_settings(ServerSettings, SECTION, values).settings
    with needs_extra("server"):
        from serving.run import run

    return run(settings)


def _keys(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="split-server keys", description="API keys, stored as hashes.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it, once")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--max-sessions", type=_count, metavar="N", help="sessions at once (default: no limit)")
    create.add_argument("--max-tokens-per-minute", type=_count, metavar="N", help="positions sent (default: no limit)")
    commands.add_parser("list", help="list names and limits")
    commands.add_parser("revoke", help="remove a key; a running server notices").add_argument("name", metavar="NAME")
    for command in commands.choices.values():
        add_flags(command, ServerSettings, ["api_key_file"])
    options = parser.parse_args(arguments)
    given = load_settings(ServerSettings, SECTION, {"api_key_file": options.api_key_file}).settings.api_key_file
    file = KeyFile(given or default_key_file())
    if options.command == "create":
        print(file.create(options.name, Limits(options.max_sessions, options.max_tokens_per_minute)))
        print(f"stored in {file.path}; it is not shown again. Serve with --api-key-file {file.path}", file=sys.stderr)
    elif options.command == "revoke":
        file.revoke(options.name)
    else:
        _print_keys(file)
    return 0


def _print_keys(file: KeyFile) -> None:
    for key in file.read():
        limits = f"max_sessions={key.max_sessions or '-'} max_tokens_per_minute={key.max_tokens_per_minute or '-'}"
        print(f"{key.name}  created={key.created}  {limits}")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
