"""The recorded results of `training_quality` as Markdown tables, as `docs/training-quality.md` shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.training_tables import markdown

Row = Mapping[str, Any]
ONE_PROCESS = "one process"


def training_quality_learning(result: Mapping[str, Any]) -> str:
    """Held-out accuracy by strategy, dealing and number of clients; seeds and private ends beside it."""
    rows = result["rows"]
    central = [row for row in rows if row["setup"]["strategy"] == "centralized"]
    seeds = markdown(
        ["centralized, seed", "right answers", "greedy in transformers", "loss"],
        [[r["setup"]["seed"], _share(r), f"{r['generated_accuracy']:.1%}", f"{r['loss']:.4f}"] for r in central],
    )
    table: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        setup = row["setup"]
        if row not in central:
            key = (setup["strategy"], setup["shared"], _dealt(setup["deal"]))
            table.setdefault(key, {})[setup["clients"]] = _with_spread(row)
    counts = sorted({setup["clients"] for setup in (row["setup"] for row in rows) if setup["clients"] > 1})
    body = [[*key, *(cells.get(count, "") for count in counts)] for key, cells in table.items()]
    head = ["strategy", "shared", "data dealt out", *(f"{count} clients" for count in counts)]
    alone = "\n\n* in one process, without server and wire" * any(row["how"] == ONE_PROCESS for row in rows)
    return f"{_untrained(result)}\n\n{seeds}\n\n{markdown(head, body)}{alone}"


def training_quality_noise(result: Mapping[str, Any]) -> str:
    """Held-out accuracy and loss by size of the noise and p."""
    parts = [_untrained(result)]
    for task in dict.fromkeys(row["setup"]["task"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["setup"]["task"] == task]
        table: dict[float, dict[int, str]] = {}
        for row in rows:
            size = float(row["setup"]["noise"].removeprefix("mean-abs="))
            shown = f"{row['loss']:.4f}" if task != "demo" else f"{_share(row)} / {row['loss']:.4f}"
            table.setdefault(size, {})[row["setup"]["p"]] = shown
        columns = sorted({row["setup"]["p"] for row in rows})
        body = [[f"{size:g}", *(cells.get(p, "") for p in columns)] for size, cells in sorted(table.items())]
        what = "right answers / loss" if task == "demo" else "loss"
        parts.append(markdown([f"{task}, mean size", *(f"p = {p}: {what}" for p in columns)], body))
    return "\n\n".join(parts)


def training_quality_multirc(result: Mapping[str, Any]) -> str:
    """Training loss at some places and held-out scores."""
    places = (0.1, 0.25, 0.5, 1.0)
    body = []
    for row in result["rows"]:
        curve = row["curve"]
        ends = [round(len(curve) * place) for place in places]
        means = [sum(curve[max(0, end - 20) : end]) / min(20, end) for end in ends]
        setup = row["setup"]
        body.append(
            [
                setup["task"],
                setup["strategy"],
                row["samples"],
                *(f"{mean:.4f}" for mean in means),
                f"{row['loss']:.4f}",
                _share(row) if setup["task"] == "multirc" else "",
            ]
        )
    seen = ["samples", *(f"loss at {place:.0%}" for place in places)]
    return f"{_untrained(result)}\n\n{markdown(['task', 'strategy', *seen, 'held-out loss', 'right answers'], body)}"


def training_quality_codecs(result: Mapping[str, Any]) -> str:
    """Accuracy, losses and bytes by codec, beside float32."""
    rows = result["rows"]
    whole = sum(_bytes(rows[0]))
    body = [
        [
            row["setup"]["codec"],
            row["setup"]["gradient_codec"],
            _share(row),
            f"{row['loss']:.4f}",
            f"{row['last_loss']:.4f}",
            *(f"{count / 1e6:.1f}" for count in _bytes(row)),
            f"{sum(_bytes(row)) / whole:.2f}",
        ]
        for row in rows
    ]
    head = ["states", "gradients", "right answers", "held-out loss", "training loss, last 20 steps"]
    return markdown([*head, "MB up", "MB down", "x fp32"], body)


def _bytes(row: Row) -> tuple[int, int]:
    return row.get("bytes_up", row.get("row_bytes_up", 0)), row.get("bytes_down", row.get("row_bytes_down", 0))


def _share(row: Row) -> str:
    return f"{row['accuracy']:.1%}"


def _with_spread(row: Row) -> str:
    """The accuracy; with private ends the mean over the clients' models, and the worst and best of them."""
    each = sorted(model["accuracy"] for model in row["models"])
    return (
        _share(row) + (f" [{each[0]:.1%}-{each[-1]:.1%}]" if len(each) > 1 else "") + "*" * (row["how"] == ONE_PROCESS)
    )


def _dealt(deal: str) -> str:
    return "iid" if deal == "iid" else f"{deal.rpartition(':')[2]} shards by label each"


def _untrained(result: Mapping[str, Any]) -> str:
    found: Sequence[Row] = result["untrained"]
    shares = (f"{row['accuracy']:.1%} right, " * (row["task"] != "passages") for row in found)
    said = (f"{row['task']} {share}loss {row['loss']:.2f}" for row, share in zip(found, shares, strict=True))
    return f"Untrained: {'; '.join(said)}."


QUALITY_TABLES: tuple[Callable[[Mapping[str, Any]], str], ...] = (
    training_quality_learning,
    training_quality_noise,
    training_quality_multirc,
    training_quality_codecs,
)
