"""One edge process of a load test. It speaks JSON lines with its parent: the job and `go` come in, events go out.

in   {"event": "job", "process": 0, "settings": {...}}     then {"event": "go"}; end of file means stop
out  note, started, ended (with a record), ready (connected and warm), error (with a code), done
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from edge_client.model_source import read_geometry
from edge_client.runtime import EdgeRuntime
from loadtest.records import Record, decode_line, encode_line
from loadtest.runner import Runner, shares
from loadtest.settings import DEFAULT_PROMPT_TOKENS, LoadSettings
from loadtest.workload import Vocabulary, Workload, parse_lengths, split_evenly
from split_llama.errors import FlLlamaError, UsageError

READ_BYTES = 65536
NO_CODE = 0


def main() -> int:
    """Do the job that comes on stdin; gives the exit code."""
    # Ctrl-C goes to the whole group; the parent decides, and says so by closing stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(_main())
    return 0


async def _main() -> None:
    lines = _Lines(asyncio.get_running_loop())
    try:
        job = await lines.next()
        if job is None:
            return
        work = asyncio.create_task(_work(job, lines))
        # The job is cancelled when the parent closes stdin, or is gone.
        stopped = asyncio.create_task(lines.ended.wait())
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        _emit("done")
    except FlLlamaError as error:
        _emit("error", code=error.code, message=error.message)
    except Exception as error:
        _emit("error", code=NO_CODE, message=f"{type(error).__name__}: {error}")
        raise


async def _work(job: dict[str, Any], lines: _Lines) -> None:
    settings, process = LoadSettings.from_json(job["settings"]), int(job["process"])
    clients = split_evenly(settings.clients, settings.processes)[process]
    connection = EdgeRuntime.connect(settings.edge(), max_sessions=clients, progress=_FetchNote(), notify=_note)
    async with connection as edge:
        workload = make_workload(settings, edge)
        runner = Runner(edge, workload, settings, process, _started, _ended)
        await runner.run(min(clients, max(1, settings.warmup)), _warmup(process, settings), warmup=True)
        _emit("ready")
        if await lines.next() is None:
            return
        await runner.run(clients, shares(process, settings.processes, settings.num_requests()))


def _warmup(process: int, settings: LoadSettings) -> Iterator[int]:
    return iter(range(-1 - process * settings.warmup, -1 - (process + 1) * settings.warmup, -1))


def make_workload(settings: LoadSettings, edge: EdgeRuntime) -> Workload:
    """Give the workload for this edge's model. Raises `UsageError` for a context too short or a file of no use."""
    prompt_tokens = parse_lengths(settings.prompt_tokens or DEFAULT_PROMPT_TOKENS)
    max_new_tokens = parse_lengths(settings.max_new_tokens)
    texts = []
    if settings.prompts is not None:
        texts = [edge.tokenizer.encode(line) for line in read_prompts(settings)]
    longest = max(map(len, texts)) if texts else prompt_tokens.longest
    # The last token is never fed, so the answer may be one longer than what is left.
    if longest + max_new_tokens.longest - 1 > edge.max_length:
        raise UsageError(
            f"prompts of up to {longest} and answers of up to {max_new_tokens.longest} tokens do not fit the "
            f"context of {edge.max_length}: shorten them with --prompt-tokens or --prompts, and --max-new-tokens"
        )
    return Workload(settings.seed, prompt_tokens, max_new_tokens, vocabulary(edge), texts)


def vocabulary(edge: EdgeRuntime) -> Vocabulary:
    """Give what random prompts for this model are made of."""
    size, tokenizer = read_geometry(edge.source.folder).vocab_size, edge.tokenizer
    special = {tokenizer.token_id(text) for text in tokenizer.special_tokens.values()} | {*edge.defaults.eos_token_ids}
    bos = edge.defaults.bos_token_id if edge.defaults.bos_token_id is not None else tokenizer.bos_token_id
    return Vocabulary(size, bos, frozenset(token for token in special if token is not None))


def read_prompts(settings: LoadSettings) -> list[str]:
    """Give the lines of the file that are not blank. Raises `UsageError`."""
    assert settings.prompts is not None
    try:
        text = settings.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {settings.prompts} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {settings.prompts} holds no prompt: one per line is expected")
    return lines


def _started() -> None:
    _emit("started")


def _ended(record: Record) -> None:
    _emit("ended", record=record.to_json())


def _note(text: str) -> None:
    _emit("note", text=text)


def _emit(event: str, **fields: Any) -> None:
    sys.stdout.buffer.write(encode_line(event, **fields))
    sys.stdout.buffer.flush()


class _FetchNote:
    """Says once that weights are being fetched: gigabytes take minutes."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, present: int, total: int) -> None:
        if not self._said and present < total:
            self._said = True
            _note(f"fetching the edge's weights: {(total - present) / 2**20:,.1f} MiB")


class _Lines:
    """Lines from stdin, read in a thread with `os.read`: that works on every system, and holds no lock at exit."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.ended = asyncio.Event()
        self._loop = loop
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        # Not in an executor: that would be waited for at the end, and stdin may stay open.
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    async def next(self) -> dict[str, Any] | None:
        """Give the next line, `None` at the end."""
        return await self._queue.get()

    def _read(self) -> None:
        rest = b""
        # RuntimeError: the loop is closed, nobody listens any more.
        with contextlib.suppress(RuntimeError):
            while piece := os.read(0, READ_BYTES):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, decode_line(line))
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._queue.put_nowait(None)
        self.ended.set()


if __name__ == "__main__":
    raise SystemExit(main())
