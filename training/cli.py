"""`split-train`: for now the bundled demo model, trained and scored. Split fine-tuning adds its commands here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from split_llama.errors import UsageError
from split_llama.extras import needs_extra

COMMANDS = {
    "demo": ("training.demo.train", "train the bundled demo model from nothing"),
    "demo-score": ("training.demo.evaluate", "score a demo model on stories it has never seen"),
    "demo-score-split": ("training.demo.score_split", "the same through a running split-server"),
}


def usage() -> str:
    """Give the help text."""
    lines = [f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: split-train COMMAND [OPTIONS]", "", *lines, "", "split-train COMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"split-train: no command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    try:
        with needs_extra("train"):
            module = importlib.import_module(COMMANDS[name][0])
    except UsageError as error:
        print(f"split-train: {error.message}", file=sys.stderr)
        return error.exit_code
    module.main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
