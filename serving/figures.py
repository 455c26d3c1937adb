"""What the engine loop counts and times: per step in plain numbers, handed to the metrics once per pass."""

from __future__ import annotations

from collections.abc import Sequence

from serving.metrics import Metrics
from serving.registry import Entry
from serving.steps import Step


class Figures:
    """Figures of the passes. `replied` for each step that was answered, then `passed` for the pass."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pass_ended = 0.0
        self._steps = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def replied(self, entry: Entry, step: Step, now: float) -> None:
        """Take in that a step was answered."""
        self._steps += 1
        if entry.last_reply_at is not None and step.is_decode:
            self._generation_tokens += step.count
            self._metrics.inter_token.observe(now - entry.last_reply_at)
        else:
            self._prompt_tokens += step.count
        if entry.last_reply_at is not None:
            entry.last_reply_at = now
        elif not entry.session.queued and not entry.session.running:
            self._metrics.first_token.observe(now - (entry.first_step_at or step.arrived))
            entry.last_reply_at = now

    def passed(self, steps: Sequence[Step], sequences: int, model_seconds: float, now: float) -> None:
        """Take in that a pass over these steps of some sequences has ended, and hand on what was counted."""
        metrics = self._metrics
        metrics.pass_seconds.observe(model_seconds)
        metrics.pass_rows.observe(sum(step.count for step in steps))
        metrics.pass_sequences.observe(sequences)
        for step in steps:
            metrics.overhead.observe(max(0.0, now - max(step.arrived, self._pass_ended) - model_seconds))
        self._pass_ended = now
        metrics.steps.inc(self._steps)
        metrics.prompt_tokens.inc(self._prompt_tokens)
        metrics.generation_tokens.inc(self._generation_tokens)
        self._steps = self._prompt_tokens = self._generation_tokens = 0
