"""What the chat tells about itself: the status line, `/stats`, the noise in words."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.generate import GenerationStats
from edge_client.settings import EdgeSettings


@dataclass(slots=True)
class Totals:
    """Sums over the chat, and the last answer's own figures."""

    answers: int = 0
    tokens: int = 0
    round_trips: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rows_up: int = 0
    last: GenerationStats | None = None
    last_tokens: int = 0

    def add(self, stats: GenerationStats, tokens: int) -> None:
        """Count an answer of so many tokens."""
        self.answers += 1
        self.tokens += tokens
        self.round_trips += stats.round_trips
        self.bytes_up += stats.bytes_up
        self.bytes_down += stats.bytes_down
        self.rows_up += stats.rows_up
        self.last, self.last_tokens = stats, tokens


def toolbar(settings: EdgeSettings, model: str, totals: Totals) -> str:
    """Give the status line."""
    parts = [model, f"partition {settings.partition}", f"noise {settings.noise}"]
    speed = _speed(totals.last)
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s")
    parts += [f"{totals.round_trips:,} round trips", f"{totals.bytes_up:,} bytes sent", "/help"]
    return " " + " · ".join(parts) + " "


def report(totals: Totals, rows_released: int) -> str:
    """Give what `/stats` shows."""
    if totals.last is None:
        return "nothing was asked yet"
    last = totals.last
    lines = [
        f"last answer  {last.prompt_tokens} tokens in the prompt, {last.cached_tokens} of them the server had already; "
        f"{totals.last_tokens} tokens of answer",
        f"             first token after {last.ttft_ms:.0f} ms, {_speed_text(last)}, "
        f"{last.round_trips} round trips, {last.rows_up} rows sent",
        f"             {last.bytes_up:,} bytes sent, {last.bytes_down:,} received",
    ]
    if last.drafted:
        share = 100 * last.accepted / last.drafted
        lines.append(f"             {last.drafted} tokens guessed, {last.accepted} of them right ({share:.0f}%)")
    lines.append(
        f"this chat    {totals.answers} answers, {totals.tokens} tokens, {totals.round_trips} round trips, "
        f"{totals.rows_up} rows, {totals.bytes_up:,} bytes sent, {totals.bytes_down:,} received"
    )
    if rows_released:
        lines.append(f"             {rows_released} distinct noised rows released to the server")
    return "\n".join(lines)


def _speed(stats: GenerationStats | None) -> float | None:
    """Tokens a second behind the first one."""
    seconds = sum(stats.itl_ms) / 1000 if stats is not None else 0.0
    return len(stats.itl_ms) / seconds if stats is not None and seconds > 0 else None


def _speed_text(stats: GenerationStats) -> str:
    speed = _speed(stats)
    return "no second token" if speed is None else f"{speed:.1f} tokens/s"
