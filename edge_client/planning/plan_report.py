"""What `plan` found, as tables with reasons and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edge_client.planning.bench_report import LABELS, describe_link, link_json, milliseconds, parts_json, table
from edge_client.planning.choice import Recommendation
from edge_client.planning.cost import LinkSpeed, Prediction, Task
from edge_client.planning.measure import Findings
from edge_client.planning.words import flags, reasons

HEADER = ["", "ms/token", "tokens/s", "first token ms", "edge MiB", "bytes up", "bytes down", "rows released"]
# So many partitions are shown: the chosen one, and those with few blocks here.
SHOWN_PARTITIONS = 6


@dataclass(frozen=True, slots=True)
class Outlook:
    """The recommendation for one link."""

    link: LinkSpeed
    advice: Recommendation
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class PlanResult:
    """All that a plan says. `outlooks` begins with the link as it is."""

    server: str
    findings: Findings
    task: Task
    outlooks: tuple[Outlook, ...]


def as_text(result: PlanResult) -> str:
    """Give the report for people."""
    measured, now = result.findings.measured, result.outlooks[0]
    server = measured.server
    best = now.advice.best
    lines = [
        f"{result.server}: {measured.model.num_blocks} blocks, hosts {measured.model.hosted}",
        describe_link(measured.link),
        f"server: {milliseconds(server.step.at(1))} ms a step over {server.blocks} blocks",
        f"foretold for {result.task.prompt_tokens} tokens of prompt and {result.task.answer_tokens} of answer; "
        f"edge MiB is weights and KV{_free(result)}",
        "",
        table(["ms per token", *(device.format.label for device in measured.devices)], _device_rows(result)),
    ]
    for title, field in (("partition", "partition"), ("weights", "format"), ("codec", "codec"), ("guesses", "guesses")):
        lines += ["", table([title, *HEADER[1:]], [_row(_label(one, field), one) for one in _varied(now, field)])]
    if len(result.outlooks) > 1:
        rows = [_row(f"{milliseconds(one.link.round_trip)} ms", one.advice.best) for one in result.outlooks]
        flagged = [[*row, flags(one.advice.best.choice)] for row, one in zip(rows, result.outlooks, strict=True)]
        lines += ["", table(["round trip", *HEADER[1:], "with"], flagged)]
    lines += ["", f"recommended: {flags(best.choice)}"]
    lines += [f"- {reason}" for reason in reasons(now.advice, measured, list(now.predictions))]
    lines += [f"- {note}" for note in result.findings.notes]
    return "\n".join(lines) + "\n"


def _free(result: PlanResult) -> str:
    free = result.findings.free_bytes
    return f", of {free / 2**20:,.0f} free" if free is not None else ""


def _device_rows(result: PlanResult) -> list[list[str]]:
    """The parts of a token at the chosen partition, without guesses, for each format."""
    choice = result.outlooks[0].advice.best.choice
    plain = [
        one
        for one in result.outlooks[0].predictions
        if (one.choice.partition, one.choice.codec, one.choice.guesses) == (choice.partition, choice.codec, 0)
    ]
    rows = [[label, *(milliseconds(getattr(one.parts, name)) for one in plain)] for name, label in LABELS.items()]
    return [*rows, ["total", *(milliseconds(one.parts.total) for one in plain)]]


def _varied(outlook: Outlook, field: str) -> list[Prediction]:
    """The recommended choice with one of its parts varied."""
    best = outlook.advice.best.choice
    fixed = {"partition", "format", "codec", "guesses"} - {field}
    rows = [
        one for one in outlook.predictions if all(getattr(one.choice, name) == getattr(best, name) for name in fixed)
    ]
    if field != "partition":
        return rows
    few = rows[:SHOWN_PARTITIONS]
    return few if outlook.advice.best in few else [*few, outlook.advice.best]


def _label(prediction: Prediction, field: str) -> str:
    value = getattr(prediction.choice, field)
    return str(getattr(value, "label", value))


def _row(label: str, one: Prediction) -> list[str]:
    return [
        label,
        milliseconds(one.parts.total),
        f"{one.tokens_per_second:.1f}",
        f"{1000 * one.first_token_seconds:.1f}",
        f"{one.memory_bytes / 2**20:,.1f}",
        f"{one.bytes_up:,.0f}",
        f"{one.bytes_down:,.0f}",
        str(one.rows_released),
    ]


def as_json(result: PlanResult) -> dict[str, Any]:
    """Give the report for programs."""
    measured, now = result.findings.measured, result.outlooks[0]
    return {
        "server": result.server,
        "task": dataclasses.asdict(result.task),
        "link": link_json(measured.link),
        "server_step": dataclasses.asdict(measured.server),
        "devices": [dataclasses.asdict(device) for device in measured.devices],
        "drafting": dataclasses.asdict(measured.drafting),
        "free_bytes": result.findings.free_bytes,
        "notes": list(result.findings.notes),
        "recommended": _prediction_json(now.advice.best) | {"flags": flags(now.advice.best.choice)},
        "fastest": _prediction_json(now.advice.fastest),
        "reasons": reasons(now.advice, measured, list(now.predictions)),
        "varied": {
            field: [_prediction_json(one) for one in _varied(now, field)]
            for field in ("partition", "format", "codec", "guesses")
        },
        "round_trips": [
            {"round_trip_ms": 1000 * one.link.round_trip} | _prediction_json(one.advice.best) for one in result.outlooks
        ],
    }


def _prediction_json(one: Prediction) -> dict[str, Any]:
    return {
        "partition": str(one.choice.partition),
        "dtype": one.choice.format.dtype,
        "quantization": one.choice.format.quantization,
        "codec": one.choice.codec.label,
        "guesses": one.choice.guesses,
        "ms_per_token": parts_json(one.parts),
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_round_trip": one.tokens_per_round,
        "first_token_ms": 1000 * one.first_token_seconds,
        "memory_bytes": one.memory_bytes,
        "bytes_up": one.bytes_up,
        "bytes_down": one.bytes_down,
        "rows_released": one.rows_released,
    }
