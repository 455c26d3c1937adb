"""Draw `decode_speed.svg` from `benchmarks/results/split_decode.json`: python docs/pictures/decode_speed.py"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "split_decode.json"
SESSIONS = ("1", "4", "16")
WEIGHTS = ("float32", "bfloat16", "float16", "int8")
COLOURS = {"1": "#9db8d9", "4": "#5a8abf", "16": "#24527f"}
LEFT, RIGHT, TOP, BAR, GAP, WIDTH = 92, 70, 74, 15, 16, 760


def bar(y: float, value: float, scale: float, colour: str, label: str) -> str:
    """One bar and its number."""
    length = value * scale
    return (
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" rx="2" fill="{colour}"/>'
        f'<text x="{LEFT + length + 6:.1f}" y="{y + BAR - 4}" class="number">{label}</text>'
    )


def draw() -> str:
    """Give the picture as SVG."""
    rates = {name: rate["median"] for name, rate in json.loads(RESULTS.read_text())["tokens_per_second"].items()}
    scale = (WIDTH - LEFT - RIGHT) / max(rates.values())
    parts, y = [], TOP
    for weights in WEIGHTS:
        parts.append(f'<text x="{LEFT - 10}" y="{y + 1.5 * BAR + 4}" class="name" text-anchor="end">{weights}</text>')
        for sessions in SESSIONS:
            value = rates[f"{weights}_{sessions}"]
            parts.append(bar(y, value, scale, COLOURS[sessions], f"{value:.0f}"))
            y += BAR
        y += GAP
    for index, dtype in enumerate(("float32", "bfloat16")):
        x = LEFT + rates[f"transformers_{dtype}"] * scale
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{y - GAP}" class="mark{index}"/>')
    keys = [
        f'<rect x="{LEFT + 120 * i}" y="40" width="12" height="12" rx="2" fill="{COLOURS[sessions]}"/>'
        f'<text x="{LEFT + 120 * i + 18}" y="50" class="number">{sessions} session{"s" * (sessions != "1")}</text>'
        for i, sessions in enumerate(SESSIONS)
    ]
    keys.append(
        f'<line x1="{LEFT + 360}" y1="40" x2="{LEFT + 360}" y2="52" class="mark0"/>'
        f'<text x="{LEFT + 368}" y="50" class="number">transformers, float32</text>'
        f'<line x1="{LEFT + 510}" y1="40" x2="{LEFT + 510}" y2="52" class="mark1"/>'
        f'<text x="{LEFT + 518}" y="50" class="number">bfloat16</text>'
    )
    style = (
        "text{font-family:system-ui,sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.name{font-size:13px}"
        ".number{font-size:12px}.mark0{stroke:#c0504d;stroke-width:2}"
        ".mark1{stroke:#c0504d;stroke-width:2;stroke-dasharray:4 3}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">'
        "<title>Tokens per second of the split by type of weights and number of sessions</title>"
        f"<style>{style}</style>"
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>'
        f'<text x="{LEFT}" y="24" class="title">Tokens/s in total, 134M parameters, one CPU thread a side</text>'
        f"{''.join(keys)}{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    (HERE / "decode_speed.svg").write_text(draw())
