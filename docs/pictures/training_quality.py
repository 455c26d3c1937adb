"""Draw `training_*.svg` from `benchmarks/results/training_quality-*.json`: python docs/pictures/training_quality.py"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
COLOURS = ("#333333", "#d08c3f", "#5a8abf", "#7b4fa3")
STYLE = (
    "text{font-family:system-ui,sans-serif;fill:#333;font-size:12px}.title{font-size:15px;font-weight:600}"
    ".name{font-size:13px;font-weight:600}.grid{stroke:#e3e7eb}.axis{fill:#667}"
)
WIDTH, PANEL, HEIGHT, LEFT, TOP = 760, 310, 190, 56, 84
SMOOTH, DOTTED = 10, 12
STEEP = (0.001, 0.01, 0.1, 1, 10)
ORDER = ("centralized", "sequential", "client-batch", "server-hierarchical", "p = 1", "p = 2", "p = 3")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """Lines by name over common x positions; `marks` are the labels below, `ticks` those at the left."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    marks: Mapping[float, str]
    ticks: Mapping[float, str]
    log: bool = False

    def draw(self, left: float, top: float, colours: Mapping[str, str]) -> str:
        """Give the panel with its upper left corner there; `colours` are those of the lines."""
        heights = list(map(self._height, self.ticks))
        low, high = min(heights), max(heights)
        first, last = min(self.marks), max(self.marks)

        def at(x: float, y: float) -> tuple[float, float]:
            share = (self._height(y) - low) / (high - low)
            across = (x - first) / (last - first) * PANEL
            return left + across, top + HEIGHT * (1 - min(1.0, max(0.0, share)))

        parts = [f'<text x="{left}" y="{top - 12}" class="name">{self.title}</text>']
        for value, label in self.ticks.items():
            y = at(first, value)[1]
            parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="axis" text-anchor="end">{label}</text>')
        for value, label in self.marks.items():
            x = at(value, min(self.ticks))[0]
            parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 18}" class="axis" text-anchor="middle">{label}</text>')
        return "".join([*parts, *(_line([at(*p) for p in line], colours[name]) for name, line in self.lines.items())])

    def _height(self, value: float) -> float:
        return math.log(max(value, min(self.ticks))) if self.log else value


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    return line + (dots if len(points) < DOTTED else "")


def picture(title: str, panels: Sequence[Panel]) -> str:
    """Put panels into one SVG, two beside each other, with one key for all."""
    names = sorted(dict.fromkeys(name for panel in panels for name in panel.lines), key=ORDER.index)
    colours = dict(zip(names, COLOURS, strict=False))
    keys = []
    for index, name in enumerate(names):
        x = LEFT + index * (WIDTH - LEFT) / max(4, len(names))
        keys.append(f'<rect x="{x:.0f}" y="38" width="12" height="12" rx="2" fill="{colours[name]}"/>')
        keys.append(f'<text x="{x + 18:.0f}" y="48">{name}</text>')
    drawn = [
        panel.draw(LEFT + (index % 2) * (PANEL + 70), TOP + index // 2 * (HEIGHT + 64), colours)
        for index, panel in enumerate(panels)
    ]
    height = TOP + -(-len(panels) // 2) * (HEIGHT + 64) - 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><title>{title}</title>'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="{LEFT}" y="24" class="title">{title}</text>{"".join(keys)}{"".join(drawn)}</svg>\n'
    )


def rows(part: str) -> list[Row]:
    """Read a part's runs."""
    found: list[Row] = json.loads((RESULTS / f"training_quality-{part}.json").read_text())["rows"]
    return found


def curve(row: Row) -> list[tuple[float, float]]:
    """A run's loss by samples seen, the mean of every few steps."""
    losses, each = row["curve"], row["samples"] / len(row["curve"])
    return [
        (each * (start + SMOOTH / 2), fmean(losses[start : start + SMOOTH])) for start in range(0, len(losses), SMOOTH)
    ]


def curves(title: str, found: Sequence[Row], ticks: Sequence[float], *, log: bool) -> Panel:
    """Loss curves of several strategies."""
    most = found[0]["samples"]
    lines = {row["setup"]["strategy"]: curve(row) for row in found}
    marks = {most * part / 4: f"{most * part / 4:.0f}" for part in range(5)}
    return Panel(title, lines, marks, {tick: f"{tick:g}" for tick in ticks}, log)


def size(row: Row) -> float:
    """The mean absolute value of a run's noise."""
    return float(row["setup"]["noise"].removeprefix("mean-abs="))


def by_noise(title: str, found: Sequence[Row], figure: str, ticks: Sequence[float], *, log: bool = False) -> Panel:
    """A figure by the size of the noise, a line for each p; sizes stand at equal distances."""
    sizes = sorted({size(row) for row in found})
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(found, key=lambda row: (row["setup"]["p"], size(row))):
        lines.setdefault(f"p = {row['setup']['p']}", []).append((sizes.index(size(row)), row[figure]))
    marks = {float(index): f"{each:g}" for index, each in enumerate(sizes)}
    return Panel(title, lines, marks, {tick: f"{tick:g}" for tick in ticks}, log)


def learning_curves(found: Sequence[Row], deal: str, clients: int) -> Panel:
    """The demo task, dealt out in one way, beside centralized training."""
    wanted = (("iid", 1, "A,B,C", 0), (deal, clients, "A,B,C", 0))
    some = [row for row in found if tuple(row["setup"][k] for k in ("deal", "clients", "shared", "seed")) in wanted]
    name = "iid" if deal == "iid" else "two shards by label each"
    return curves(f"{clients} clients, {name}", some, STEEP, log=True)


def draw() -> dict[str, str]:
    """Give all pictures by file name."""
    learned, read, noised = rows("learning"), rows("multirc"), rows("noise")
    verdicts, passages = ([row for row in read if row["setup"]["task"] == task] for task in ("multirc", "passages"))
    read_panels = [curves("yes or no, demo model", verdicts, (0.1, 1, 10), log=True)]
    if passages:
        read_panels.append(curves("passages, stories260K", passages, (3, 3.5, 4, 4.5), log=False))
    return {
        "training_learning.svg": picture(
            "Loss by samples seen, demo task",
            [learning_curves(learned, "iid", 4), learning_curves(learned, "shards:2", 8)],
        ),
        "training_multirc.svg": picture("Loss by samples seen, MultiRC, 4 clients", read_panels),
        "training_noise.svg": picture(
            "Held-out scores by mean absolute noise, in training and in scoring",
            [panel for panel in noise_panels(noised) if len(panel.marks) > 1],
        ),
    }


def noise_panels(found: Sequence[Row]) -> list[Panel]:
    """The noise axis on both tasks, as far as it was measured."""
    demo, texts = ([row for row in found if row["setup"]["task"] == task] for task in ("demo", "passages"))
    return [
        by_noise("demo task: share of right answers", demo, "accuracy", (0, 0.25, 0.5, 0.75, 1)),
        by_noise("demo task: loss", demo, "loss", STEEP, log=True),
        by_noise("MultiRC passages, stories260K: loss", texts, "loss", (3.1, 3.2, 3.3, 3.4, 3.5)),
    ]


if __name__ == "__main__":
    for name, drawn in draw().items():
        (HERE / name).write_text(drawn)
