"""The figures of `bench`, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from edge_client.planning.bench import BenchResult, Mode
from edge_client.planning.cost import LinkSpeed, Parts

LABELS = {
    "a": "A (first blocks)",
    "c": "C (last blocks)",
    "head": "head",
    "sampling": "sampling, text",
    "drafting": "drafting",
    "codec": "noise, codec",
    "wire": "wire (bytes)",
    "wait": "wait (the way)",
    "server": "server",
    "overhead": "edge overhead",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out columns: the first to the left, the others to the right."""
    every = [header, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(header))]

    def line(row: list[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(len(first)), *others]).rstrip()

    return "\n".join(map(line, every))


def milliseconds(seconds: float) -> str:
    """Give milliseconds with as many digits as mean something."""
    return f"{1000 * seconds:.3f}"


def describe_link(link: LinkSpeed) -> str:
    """Say what the link is like."""
    return f"link: round trip {milliseconds(link.round_trip)} ms, up {_megabits(link.up)}, down {_megabits(link.down)}"


def _megabits(rate: float) -> str:
    return "too fast to tell" if math.isinf(rate) else f"{8 * rate / 1e6:,.1f} Mbit/s"


def as_text(result: BenchResult) -> str:
    """Give the report for people."""
    modes = result.modes
    noise = f"noise {result.noise_sigma:.4g}" if result.noise_sigma else "noise off"
    lines = [
        f"{result.server}: partition {result.partition}, codec {result.codec}, {noise}",
        describe_link(result.link),
        f"{len(modes[0].tokens_per_second)} times {result.prompt_tokens} tokens of prompt, behind the first token:",
        "",
        table(["ms per token", *(f"speculate {mode.speculate}" for mode in modes)], _time_rows(modes)),
        "",
        table(["", *(f"speculate {mode.speculate}" for mode in modes)], _count_rows(modes)),
        "",
        _where_from(modes),
    ]
    return "\n".join(lines) + "\n"


def _time_rows(modes: tuple[Mode, ...]) -> list[list[str]]:
    rows = [[label, *(milliseconds(getattr(mode.parts, name)) for mode in modes)] for name, label in LABELS.items()]
    return [*rows, ["total", *(milliseconds(mode.parts.total) for mode in modes)]]


def _count_rows(modes: tuple[Mode, ...]) -> list[list[str]]:
    def row(label: str, cells: list[str]) -> list[str]:
        return [label, *cells]

    return [
        row("tokens/s, median", [f"{mode.median_speed:.1f}" for mode in modes]),
        row("  slowest, fastest", [_range(mode.tokens_per_second) for mode in modes]),
        row("  of the typical round", [f"{mode.typical_speed:.1f}" for mode in modes]),
        row("first token, ms", [f"{1000 * mode.first_token_seconds:.1f}" for mode in modes]),
        row("round trips", [str(mode.round_trips) for mode in modes]),
        row("tokens per round trip", [f"{mode.tokens / max(1, mode.round_trips):.2f}" for mode in modes]),
        row("guesses sent, right", [f"{mode.drafted}, {mode.accepted}" for mode in modes]),
        row("rows up per token", [f"{mode.rows_up / max(1, mode.tokens):.2f}" for mode in modes]),
        row("bytes up per token", [f"{mode.bytes_up / max(1, mode.tokens):,.0f}" for mode in modes]),
        row("bytes down per token", [f"{mode.bytes_down / max(1, mode.tokens):,.0f}" for mode in modes]),
    ]


def _range(speeds: tuple[float, ...]) -> str:
    return f"{min(speeds):.1f}, {max(speeds):.1f}" if speeds else "-"


def _where_from(modes: tuple[Mode, ...]) -> str:
    if all(mode.server_told for mode in modes):
        return "server: its own metrics; wait: the rest of the round trip"
    return "wait: an empty round trip as measured; server: the rest, as its metrics did not tell or served others too"


def as_json(result: BenchResult) -> dict[str, Any]:
    """Give the report for programs: seconds, bytes."""
    return {
        "server": result.server,
        "partition": result.partition,
        "codec": result.codec,
        "noise_sigma": result.noise_sigma,
        "link": link_json(result.link),
        "prompt_tokens": result.prompt_tokens,
        "modes": [_mode_json(mode) for mode in result.modes],
    }


def link_json(link: LinkSpeed) -> dict[str, float | None]:
    """Give the link's figures; null for what is too fast to tell."""
    return {
        "round_trip_seconds": link.round_trip,
        "up_bytes_per_second": None if math.isinf(link.up) else link.up,
        "down_bytes_per_second": None if math.isinf(link.down) else link.down,
    }


def parts_json(parts: Parts) -> dict[str, float]:
    """Give milliseconds by part, and their sum."""
    return {name: round(1000 * seconds, 6) for name, seconds in parts.as_dict().items()} | {
        "total": round(1000 * parts.total, 6)
    }


def _mode_json(mode: Mode) -> dict[str, Any]:
    figures = dataclasses.asdict(mode)
    figures["ms_per_token"] = parts_json(mode.parts)
    figures["tokens_per_second"] = list(mode.tokens_per_second)
    del figures["parts"]
    return figures
