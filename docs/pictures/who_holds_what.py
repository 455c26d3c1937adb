"""Draw docs/pictures/who_holds_what.svg: `python docs/pictures/who_holds_what.py`."""

from __future__ import annotations

from pathlib import Path

INK, PAPER, EDGE, SERVER, WIRE = "#1f2933", "#ffffff", "#e3f4e8", "#e4ecfb", "#b4590e"
FONT = "font-family='Helvetica, Arial, sans-serif'"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """Draw a rounded box with centred lines; the first is bold."""
    parts = [f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='8' fill='{fill}' stroke='{INK}'/>"]
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for number, line in enumerate(lines):
        weight = "bold" if number == 0 else "normal"
        parts.append(
            f"<text x='{x + width / 2}' y='{top + 18 * number}' text-anchor='middle' font-size='14' "
            f"font-weight='{weight}' fill='{INK}' {FONT}>{line}</text>"
        )
    return "\n".join(parts)


def arrow(x1: int, y1: int, x2: int, y2: int, colour: str, label: str = "", above: bool = True) -> str:
    """Draw an arrow with its label over or under the middle."""
    line = f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{colour}' stroke-width='2' marker-end='url(#head)'/>"
    y = (y1 + y2) / 2 + (-8 if above else 20)
    text = (
        f"<text x='{(x1 + x2) / 2}' y='{y}' text-anchor='middle' font-size='13' fill='{colour}' {FONT}>{label}</text>"
    )
    return line + (text if label else "")


def picture() -> str:
    """Give the whole picture as SVG."""
    parts = [
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 900 400'>",
        f"<defs><marker id='head' markerWidth='9' markerHeight='7' refX='8' refY='3.5' orient='auto'>"
        f"<polygon points='0 0, 9 3.5, 0 7' fill='{INK}'/></marker></defs>",
        f"<rect width='900' height='400' fill='{PAPER}'/>",
        f"<rect x='10' y='10' width='430' height='380' rx='12' fill='{EDGE}' stroke='{INK}'/>",
        f"<text x='30' y='40' font-size='18' font-weight='bold' fill='{INK}' {FONT}>edge: your machine</text>",
        f"<rect x='620' y='10' width='270' height='380' rx='12' fill='{SERVER}' stroke='{INK}'/>",
        f"<text x='640' y='40' font-size='18' font-weight='bold' fill='{INK}' {FONT}>server: the GPU</text>",
        box(30, 60, 110, 60, PAPER, "your text", "tokenizer"),
        box(165, 55, 130, 70, PAPER, "segment A", "embedding", "blocks 0 … p-1"),
        box(320, 60, 100, 60, PAPER, "noise", "clip, add"),
        box(645, 60, 220, 230, PAPER, "segment B", "blocks p … L-q-1", "", "KV cache in pages", "one batch for all"),
        box(165, 225, 130, 70, PAPER, "segment C", "blocks L-q … L-1", "norm, LM head"),
        box(30, 230, 110, 60, PAPER, "sample", "next token"),
        arrow(140, 90, 163, 90, INK),
        arrow(295, 90, 318, 90, INK),
        arrow(420, 90, 643, 90, WIRE, "one noised hidden state"),
        arrow(643, 260, 297, 260, WIRE, "", above=False),
        f"<text x='530' y='252' text-anchor='middle' font-size='13' fill='{WIRE}' {FONT}>one hidden state back</text>",
        arrow(165, 260, 142, 260, INK),
        arrow(85, 230, 85, 122, INK, ""),
        f"<text x='30' y='335' font-size='13' fill='{INK}' {FONT}>Never sent: text, token ids, logits,</text>",
        f"<text x='30' y='355' font-size='13' fill='{INK}' {FONT}>the edge's weights and its KV cache.</text>",
        f"<text x='640' y='335' font-size='13' fill='{INK}' {FONT}>What it can still infer from</text>",
        f"<text x='640' y='355' font-size='13' fill='{INK}' {FONT}>hidden states: docs/privacy.md</text>",
        "</svg>",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture() + "\n", encoding="utf-8")
