"""The rows of an evaluation as aligned text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.attacks.measure import Recovery
from training.evaluate.questions import PERPLEXITY, Result


@dataclass(frozen=True, slots=True)
class Attacked:
    """What an attack recovered of the rows sent, and of the same rows in a wrong order (its control)."""

    attack: str
    recovered: Recovery
    shuffled: Recovery


@dataclass(frozen=True, slots=True)
class Row:
    """One model on the task. `partition`, `noise` and `codec` are empty for the whole model."""

    model: str
    result: Result
    partition: str = ""
    noise: str = ""
    codec: str = ""
    attacked: Attacked | None = None

    def to_json(self) -> dict[str, Any]:
        """Give all that is known of the row; scores as they are, infinite ones as null."""
        scores = {name: value if math.isfinite(value) else None for name, value in self.result.scores.items()}
        told: dict[str, Any] = {
            "model": self.model,
            "partition": self.partition or None,
            "noise": self.noise or None,
            "codec": self.codec or None,
            "scores": scores,
            "examples": self.result.examples,
            "seconds": self.result.seconds,
            "examples_per_second": self.result.examples_per_second,
        }
        if self.attacked is not None:
            recovered = self.attacked.recovered
            told["attack"] = {
                "name": self.attacked.attack,
                "recovered": recovered.share,
                "tokens": recovered.total,
                "shuffled": self.attacked.shuffled.share,
            }
        return told


def text_table(rows: Sequence[Row]) -> str:
    """Give the rows as aligned text under a line of headings."""
    scores = list(dict.fromkeys(name for row in rows for name in row.result.scores))
    attacked = any(row.attacked is not None for row in rows)
    head = ["model", "p,q", "noise", "codec", *scores, "examples/s", *(["recovered"] if attacked else [])]
    lines = [head, *(_cells(row, scores, attacked) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    # Words to the left, figures to the right.
    words = 4
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < words else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: Row, scores: Sequence[str], attacked: bool) -> list[str]:
    cells = [row.model, row.partition or "-", row.noise or "-", row.codec or "-"]
    cells += [_score(name, row.result.scores.get(name)) for name in scores]
    cells.append(f"{row.result.examples_per_second:.1f}")
    if attacked:
        cells.append("-" if row.attacked is None else f"{row.attacked.recovered.share:.1%}")
    return cells


def _score(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name == PERPLEXITY else f"{value:.1%}"
