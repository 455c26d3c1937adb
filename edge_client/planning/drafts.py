"""What this edge's guesses are worth, from a short real answer to a public prompt."""

from __future__ import annotations

import dataclasses

from edge_client.planning.bench import Bench, BenchPlan
from edge_client.planning.cost import Drafting
from edge_client.planning.talk import Notify
from edge_client.planning.watch import Watched
from edge_client.rest import ModelCard
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from edge_client.threads import in_thread
from split_llama.errors import UsageError

# Guesses asked for in every round: `auto` would make none where they do not pay, and then tell nothing.
GUESSES = 8
NEW_TOKENS = 96
PROMPT_TOKENS = 48
# Halvings of [0, 1] until the acceptance is known to four digits.
HALVINGS = 14


async def measure_drafts(settings: EdgeSettings, card: ModelCard, notify: Notify) -> Drafting | None:
    """Answer with `GUESSES` guesses a round; `None` when no guess was made. Raises `FlLlamaError`."""
    if settings.speculate == "off":
        raise UsageError("--measure-drafts measures guesses, and --speculate off makes none: leave one of them out")
    fixed = dataclasses.replace(settings, speculate=str(GUESSES))
    source = await in_thread(lambda: prepare(fixed, card=card, notify=notify))
    async with EdgeRuntime.connect(fixed, source=source, notify=notify) as edge:
        length = edge.max_length
        plan = BenchPlan(min(PROMPT_TOKENS, length // 2), min(NEW_TOKENS, length // 2), 1)
        answer = await Bench(fixed, plan, edge).answer(fixed.speculate, plan.new_tokens)
    return worth(answer, notify)


def worth(answer: Watched, notify: Notify) -> Drafting | None:
    """Read an answer made with `GUESSES` guesses a round as a chain of guesses that are all alike."""
    drafted = sum(one.drafted for one in answer.rounds)
    if not drafted:
        notify("no guess was made: there is no draft head, and nothing in the text repeated")
        return None
    accepted = sum(one.accepted for one in answer.rounds)
    return Drafting(
        acceptance=acceptance_for(accepted / len(answer.rounds), GUESSES),
        seconds_per_guess=sum(one.phases.draft for one in answer.rounds) / drafted,
        source=f"measured: {accepted} of {drafted} guesses right in {len(answer.rounds)} rounds",
    )


def acceptance_for(accepted: float, guesses: int) -> float:
    """Give the chance per guess at which a chain of `guesses` has `accepted` right on average."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(middle**depth for depth in range(1, guesses + 1)) < accepted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
