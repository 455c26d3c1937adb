"""The command `split-train`. Everything but results goes to stderr.

Exit codes: 0 done, 2 wrong usage, 3 the server refused or cannot be reached, 4 the model is unusable, 130 interrupted.
Only the module of the command that runs is imported, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from edge_client.printable import printable
from split_llama.errors import FlLlamaError, Unauthenticated, UsageError
from split_llama.extras import needs_extra

INTERRUPTED = 130
COMMANDS = {
    "run": ("training.commands.run", "fine-tune on this machine: server, clients and all, from one file"),
    "server": ("training.commands.server", "make a job for clients elsewhere, with a server or on a running one"),
    "client": ("training.commands.client", "take part in a job with data of one's own"),
    "evaluate": ("training.commands.evaluate", "score a model on a task, whole and split, with and without noise"),
    "export": ("training.commands.export", "write what was trained as one PEFT folder"),
    "demo": ("training.demo.train", "train the bundled demo model from nothing"),
    "demo-score": ("training.demo.evaluate", "score a demo model on stories it has never seen"),
    "demo-score-split": ("training.demo.score_split", "the same through a running split-server"),
}


def usage() -> str:
    """Give the help text."""
    lines = [f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: split-train COMMAND [OPTIONS]", "", *lines, "", "split-train COMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"split-train: no command {name!r}\n{usage()}", file=sys.stderr)
        return UsageError.exit_code
    try:
        with needs_extra("train"):
            module = importlib.import_module(COMMANDS[name][0])
            # The older commands give nothing back.
            return module.main(rest) or 0
    except FlLlamaError as error:
        advice = "; here that is --api-key KEY" if isinstance(error, Unauthenticated) else ""
        print(printable(f"split-train: {error.message}{advice}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
