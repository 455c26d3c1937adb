"""`edge-client generate`: one answer to one prompt, as text or as one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from edge_client.chat_template import load_template, render
from edge_client.deadline import deadline
from edge_client.generate import GenerationStats
from edge_client.printable import for_stream, printable
from edge_client.rest import ModelCard
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from edge_client.threads import in_thread
from edge_client.turn import Turn
from edge_client.usual_params import usual_params
from edge_client.weights import Progress
from split_llama.errors import UsageError
from split_llama.noise import NoiseSpec


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate and how to show it."""

    prompt: str
    chat: bool = False
    system: str | None = None
    as_json: bool = False
    quiet: bool = False


def generate(settings: EdgeSettings, request: Request, card: ModelCard) -> None:
    """Generate one answer. Ctrl-C cancels, closes the session on the server, and raises `KeyboardInterrupt`."""
    prompt = _read_stdin() if request.prompt == "-" else request.prompt
    asyncio.run(_generate(settings, request, card, prompt))


async def _generate(settings: EdgeSettings, request: Request, card: ModelCard, prompt: str) -> None:
    notify = _notifier(request.quiet)
    with progress_bar(request.quiet) as progress:
        source = await in_thread(lambda: prepare(settings, card=card, progress=progress, notify=notify))
        async with EdgeRuntime.connect(settings, source=source) as edge:
            notify(describe_noise(settings, edge.noise))
            ids = _tokenise(edge, request, prompt)
            turn = edge.turn(ids, usual_params(edge, settings))
            text = []
            async with deadline(settings.request_timeout), edge.open() as session:
                async for event in session.generate(ids, turn):
                    text.append(event.text)
                    if event.text and not request.as_json:
                        sys.stdout.write(for_stream(event.text, sys.stdout))
                        sys.stdout.flush()
            if request.as_json:
                report = _report("".join(text), turn, session.stats, edge)
                sys.stdout.write(for_stream(report, sys.stdout) + "\n")
            else:
                sys.stdout.write("\n")
                notify(_summary(turn, session.stats, edge.rows_released))


def _tokenise(edge: EdgeRuntime, request: Request, prompt: str) -> list[int]:
    if not request.chat:
        return edge.tokenizer.encode(prompt)
    messages = [{"role": "system", "content": request.system}] if request.system is not None else []
    messages.append({"role": "user", "content": prompt})
    text = render(load_template(edge.source.folder), messages, edge.tokenizer.special_tokens)
    return edge.tokenizer.encode(text, special_tokens=False)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on stdin is no text in {sys.stdin.encoding}: {error}") from error


def _notifier(quiet: bool) -> Callable[[str], None]:
    def notify(line: str) -> None:
        if not quiet:
            sys.stderr.write(printable(line) + "\n")

    return notify


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Give something that shows on stderr how far fetching weights has come; nothing while it is quick, or `quiet`."""
    with tqdm(unit="B", unit_scale=True, desc="fetching weights", delay=0.3, leave=False, disable=quiet or None) as bar:

        def progress(present: int, total: int) -> None:
            bar.total = total
            bar.update(present - bar.n)

        yield progress


def describe_noise(settings: EdgeSettings, spec: NoiseSpec) -> str:
    """Say in a line what noise is in force, and what it is not."""
    if not spec.is_on:
        return "noise: off, rows are sent as they are"
    if spec.plugin:
        return f"noise: {spec.plugin}, your own; what it protects is yours to know (docs/python-api.md)"
    return (
        f"noise: standard deviation {spec.sigma:.4g} on every value ({settings.noise}), rows clipped to norm "
        f"{spec.clip:.4g}; this raises an attacker's cost and is no proof of privacy (docs/privacy.md)"
    )


def _summary(turn: Turn, stats: GenerationStats, rows_released: int) -> str:
    count = len(turn.tokens)
    speed = f"{1000 * len(stats.itl_ms) / sum(stats.itl_ms):.1f} tokens/s, " if stats.itl_ms else ""
    return (
        f"{stats.prompt_tokens} + {count} tokens, {speed}first after {stats.ttft_ms:.0f} ms, "
        f"{stats.bytes_up:,} bytes up, {stats.bytes_down:,} down, {stats.round_trips} round trips"
        + (f", {stats.accepted} of {stats.drafted} guesses right" if stats.drafted else "")
        + (f", {rows_released} distinct noised rows released" if rows_released else "")
    )


def _report(text: str, turn: Turn, stats: GenerationStats, edge: EdgeRuntime) -> str:
    report = {
        "text": text,
        "token_ids": turn.tokens,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": len(turn.tokens),
        "finish_reason": turn.finish_reason,
        "ttft_ms": round(stats.ttft_ms, 3),
        "itl_ms": [round(value, 3) for value in stats.itl_ms],
        "total_ms": round(stats.total_ms, 3),
        "bytes_up": stats.bytes_up,
        "bytes_down": stats.bytes_down,
        "round_trips": stats.round_trips,
        "guesses": stats.drafted,
        "guesses_right": stats.accepted,
        "partition": str(edge.source.partition),
        "noise_sigma": None if edge.noise.plugin else edge.noise.sigma,
    }
    return json.dumps(report, ensure_ascii=False)
