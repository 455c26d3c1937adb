"""An emulated link as a process of its own: its clock does not wait for what the caller computes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from split_llama.errors import UsageError

END_SECONDS = 10.0


@contextlib.contextmanager
def proxy_process(target: str, *flags: str) -> Iterator[str]:
    """Run `split-loadtest proxy --target TARGET FLAGS` for the block; give the address to use instead of `target`.

    `with proxy_process(url, "--rtt", "80", "--bandwidth", "50") as slow_url`. Raises `UsageError` if it does not start.
    """
    command = [sys.executable, "-m", "loadtest", "proxy", "--target", target, *flags]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise UsageError(f"the link's proxy did not start (exit code {process.wait(END_SECONDS)}); see above why")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
