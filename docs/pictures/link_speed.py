"""Draw `link_speed.svg` from `benchmarks/results/links-speculation.json`: python docs/pictures/link_speed.py"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "links-speculation.json"
MODES = {"off": "no guesses", "lookup": "prompt lookup", "head": "draft head", "both": "both", "wrong": "always wrong"}
COLOURS = {"off": "#9aa5b1", "lookup": "#9db8d9", "head": "#5a8abf", "both": "#24527f", "wrong": "#d9b38c"}
LEFT, RIGHT, TOP, BAR, GAP, WIDTH = 150, 150, 74, 15, 16, 760
STYLE = (
    "text{font-family:system-ui,sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.name{font-size:13px}"
    ".number{font-size:12px}"
)


def row(y: float, found: dict[str, float], scale: float, colour: str) -> str:
    """One bar with its speed and its tokens per round trip."""
    speed, trip = found["tokens_per_second"], found["tokens_per_round_trip"]
    return (
        f'<rect x="{LEFT}" y="{y}" width="{speed * scale:.1f}" height="{BAR - 2}" rx="2" fill="{colour}"/>'
        f'<text x="{LEFT + speed * scale + 6:.1f}" y="{y + BAR - 4}" class="number">'
        f"{speed:.0f} ({trip:.1f} a round trip)</text>"
    )


def draw() -> str:
    """Give the picture as SVG."""
    places = json.loads(RESULTS.read_text())["speculation"]
    fastest = max(found["tokens_per_second"] for modes in places.values() for found in modes.values())
    scale = (WIDTH - LEFT - RIGHT) / fastest
    parts, y = [], TOP
    for place, modes in places.items():
        model, _, trip = place.rpartition("_")
        name = f"{model}, {trip.removesuffix('ms')} ms"
        parts.append(f'<text x="{LEFT - 10}" y="{y + 2.5 * BAR + 4}" class="name" text-anchor="end">{name}</text>')
        for mode in MODES:
            parts.append(row(y, modes[mode], scale, COLOURS[mode]))
            y += BAR
        y += GAP
    keys = [
        f'<rect x="{LEFT + 112 * i}" y="40" width="12" height="12" rx="2" fill="{COLOURS[mode]}"/>'
        f'<text x="{LEFT + 112 * i + 18}" y="50" class="number">{label}</text>'
        for i, (mode, label) in enumerate(MODES.items())
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">'
        "<title>Tokens per second over slow links, by where guesses come from</title>"
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{y}" fill="#fff"/>'
        f'<text x="{LEFT}" y="24" class="title">Tokens/s over a slow link, by where guesses come from</text>'
        f"{''.join(keys)}{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    (HERE / "link_speed.svg").write_text(draw())
