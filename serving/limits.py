"""What one API key may use: sessions at once, rows per minute. Pure; the clock is given."""

from __future__ import annotations

from dataclasses import dataclass

from split_llama.errors import LimitExceeded

SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one key; `None` is no limit. A token is one position sent, drafts and replays included."""

    max_sessions: int | None = None
    max_tokens_per_minute: int | None = None


NO_LIMITS = Limits()


class TokenBucket:
    """Rows an owner may still send now: fills by `per_minute / 60` a second, and holds one minute's worth."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_at = now

    def level(self, now: float) -> float:
        """Give the rows left at `now` seconds."""
        passed = max(0.0, now - self._filled_at)
        return min(float(self.per_minute), self._level + passed * self.per_minute / SECONDS)

    def take(self, rows: int, now: float) -> None:
        """Take `rows`; a step larger than the whole bucket passes when the bucket is full. Raises `LimitExceeded`."""
        level = self.level(now)
        needed = min(rows, self.per_minute)
        if level < needed:
            wait_ms = int((needed - level) * SECONDS * 1000 / self.per_minute) + 1
            raise LimitExceeded(
                f"this key may send {self.per_minute} tokens per minute; try again in {wait_ms} ms",
                retry_after_ms=wait_ms,
            )
        self._level, self._filled_at = level - rows, now
