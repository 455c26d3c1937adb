"""The report: one JSON document, and the table made from it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from loadtest.agreement import Agreement
from split_llama.errors import UsageError

FORMAT = 1
COLUMNS = ("p50", "p90", "p99", "max")


def describe_agreement(agreement: Agreement) -> dict[str, Any]:
    """Give a verdict as a JSON object; an open end of a range is null."""
    lines = [
        {
            "counter": line.counter,
            "ours": [line.low, None if math.isinf(line.high) else line.high],
            "server": line.server,
            "agrees": line.agrees,
        }
        for line in agreement.lines
    ]
    return {"checked": agreement.checked, "agrees": agreement.agrees, "notes": list(agreement.notes), "counters": lines}


def render(document: dict[str, Any]) -> str:
    """Give the table for people. Raises `UsageError` if the document is no report."""
    try:
        if document["format"] != FORMAT:
            raise UsageError(f"the report has format {document['format']}, this version reads {FORMAT}")
        return "\n".join(_lines(document))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"this is no report of split-loadtest run --json ({error!r})") from error


def _lines(document: dict[str, Any]) -> Iterator[str]:
    settings, server, result = document["settings"], document["server"], document["result"]
    first, stop = server["blocks"]
    yield f"server          {settings['server']}, model {server['model']}, blocks {first} to {stop - 1}"
    clients, processes = _count(settings["clients"], "client"), _count(settings["processes"], "process", "es")
    yield (
        f"load            {clients} in {processes}, partition {settings['partition']}, codec {settings['codec']}, "
        f"noise {settings['noise']}, seed {settings['seed']}"
    )
    yield from _requests(document)
    yield (
        f"output          {result['output_tokens']:,} tokens, {result['output_tokens_per_s']:,.1f} tokens/s in all, "
        f"per session p50 {_figure(result['session_tokens_per_s'], 'p50')}, "
        f"slowest {_figure(result['session_tokens_per_s'], 'min')}"
    )
    yield f"prompts         {result['prompt_tokens']:,} tokens, {result['prompt_tokens_per_s']:,.1f} tokens/s"
    yield from _latencies(result)
    yield from _traffic(result)
    yield from _agreement(document["agreement"])


def _latencies(result: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{'latency, ms':<16}" + "".join(f"{column:>10}" for column in COLUMNS)
    for title, key in (
        ("first token", "ttft_ms"),
        ("between tokens", "inter_token_ms"),
        ("whole answer", "end_to_end_ms"),
    ):
        yield f"{title:<16}" + "".join(f"{_figure(result[key], column):>10}" for column in COLUMNS)
    yield ""


def _traffic(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"traffic         {result['bytes_up']:,} bytes up, {result['bytes_down']:,} down; for each position sent "
        f"{result['bytes_up_per_position']:,.1f} up, {result['bytes_down_per_position']:,.1f} down"
    )
    yield (
        f"round trips     {result['round_trips']:,}, {result['round_trips_per_output_token']:.2f} for each token "
        "of the answers"
    )


def _requests(document: dict[str, Any]) -> Iterator[str]:
    result = document["result"]
    requests, planned = result["requests"], document["planned_requests"]
    failed = sum(kind["count"] for kind in requests["failed"].values())
    ended = requests["ok"] + failed
    short = planned is not None and planned > ended and document["settings"]["duration"] is None
    missing = f", {planned - ended} not made" if short else ""
    interrupted = " (interrupted)" if document["interrupted"] else ""
    yield (
        f"requests        {requests['ok']} answered, {failed} failed{missing} in {result['wall_s']:.2f} s, "
        f"{result['requests_per_s']:.2f} a second{interrupted}"
    )
    for name, kind in requests["failed"].items():
        yield f"  {kind['count']:>5} {name}: {kind['example']}"
    for name, kind in document["warmup"]["failed"].items():
        yield f"  {kind['count']:>5} {name} in the warm-up: {kind['example']}"
    for problem in document["problems"]:
        yield f"  {problem}"


def _agreement(agreement: dict[str, Any] | None) -> Iterator[str]:
    if agreement is None:
        yield "counters        not checked (--no-check)"
        return
    if agreement["agrees"]:
        yield f"counters        the server's agree with ours, all {len(agreement['counters'])} compared"
    elif agreement["checked"]:
        yield "counters        THE SERVER'S DISAGREE WITH OURS"
        yield f"{'':16}{'counter':<40}{'ours':>16}{'server':>14}"
        for line in agreement["counters"]:
            mark = "" if line["agrees"] else "  <--"
            yield f"{'':16}{line['counter']:<40}{_range(line['ours']):>16}{line['server']:>14,.0f}{mark}"
    else:
        yield "counters        COULD NOT BE COMPARED"
    for note in agreement["notes"]:
        yield f"{'':16}{note}"


def _range(ours: list[float | None]) -> str:
    low, high = ours
    if high is None:
        return f"{low:,.0f} or more"
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}" + plural * (number != 1)


def _figure(described: dict[str, float], name: str) -> str:
    return f"{described[name]:,.1f}" if name in described else "-"
