"""What commands say while they work: on stderr, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable

from edge_client.printable import printable

Notify = Callable[[str], None]


def notifier(quiet: bool) -> Notify:
    """Give what says a line to the user."""

    def notify(line: str) -> None:
        if not quiet:
            sys.stderr.write(printable(line) + "\n")

    return notify
