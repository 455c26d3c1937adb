"""Which of the predictions to recommend. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.planning.cost import Prediction
from split_llama.errors import UsageError
from split_llama.wire.codec import Codec

# More blocks here, coarser numbers or more guesses must gain so much, which is also about what measuring errs.
WORTH = 0.10
# Of the free memory, so much is left to others.
MEMORY_SHARE = 0.8
CODECS = (Codec.FP16, Codec.INT8, Codec.BF16, Codec.FP32)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The prediction to go by, the fastest of all, and what was left out."""

    best: Prediction
    fastest: Prediction
    too_large: int


def recommend(predictions: Sequence[Prediction], free_bytes: int | None) -> Recommendation:
    """Take the mildest of all that are nearly as fast as the fastest one.

    Never one without blocks in front, and none without blocks behind if there is a choice: then the server computes up
    to the states that the public head turns into words. Mild means, in this order: weights of the format that was
    measured first, few blocks at the edge, few guesses (each is a row released), the usual codec.

    Raises `UsageError` when nothing fits.
    """
    guarded = [prediction for prediction in predictions if prediction.choice.partition.p > 0]
    behind = [prediction for prediction in guarded if prediction.choice.partition.q > 0]
    allowed = behind or guarded
    if not allowed:
        raise UsageError(
            "this server leaves no partition with a block in front (p of 1 or more), and less is never recommended"
        )
    fitting = [one for one in allowed if free_bytes is None or one.memory_bytes <= MEMORY_SHARE * free_bytes]
    if not fitting:
        least = min(one.memory_bytes for one in allowed)
        raise UsageError(
            f"the edge's part needs at least {least / 2**20:,.0f} MiB; {(free_bytes or 0) / 2**20:,.0f} MiB are free "
            f"here, and {1 - MEMORY_SHARE:.0%} of that should stay so. Free some memory or use a smaller model"
        )
    fastest = max(fitting, key=lambda one: one.tokens_per_second)
    formats = list(dict.fromkeys(one.choice.format for one in predictions))
    near = [one for one in fitting if one.tokens_per_second >= (1 - WORTH) * fastest.tokens_per_second]

    def harm(one: Prediction) -> tuple[int, ...]:
        choice = one.choice
        size = choice.partition.p + choice.partition.q
        return formats.index(choice.format), size, choice.partition.p, choice.guesses, CODECS.index(choice.codec)

    return Recommendation(min(near, key=harm), fastest, len(allowed) - len(fitting))
