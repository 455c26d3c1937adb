"""Reasons for a recommendation, in plain words."""

from __future__ import annotations

from edge_client.planning.choice import WORTH, Recommendation
from edge_client.planning.cost import Choice, Drafting, Measured, Prediction

PARTITION_MEANS = (
    "p blocks in front and q behind stay here; the server runs what lies between. p = 0 would send bare token "
    "embeddings and is never recommended. More blocks here mean more work for this device and one guess more costly "
    "for an attacker, but no proof of privacy: docs/privacy.md says what was recovered"
)


def why_partition(advice: Recommendation, measured: Measured) -> str:
    """Say why the partition was chosen."""
    least = measured.model.partitions()[0]
    chosen = advice.best.choice.partition
    here = measured.device(advice.best.choice.format).block.at(1)
    there = (measured.server.step.at(1) - measured.server.fixed) / measured.server.blocks
    pace = f"a block takes {1000 * here:.2f} ms here and {1000 * there:.2f} ms on the server"
    if chosen.p + chosen.q <= least.p + max(1, least.q):
        return f"the least that keeps a block at both ends; {pace}"
    return f"more blocks here than needed make it over {WORTH:.0%} faster: {pace}"


def flags(choice: Choice) -> str:
    """Give the flags that make the edge run like this."""
    parts = [f"--partition {choice.partition}", f"--dtype {choice.format.dtype}"]
    if choice.format.quantization != "none":
        parts.append(f"--quantization {choice.format.quantization}")
    parts += [f"--codec {choice.codec.label}", "--speculate auto" if choice.guesses else "--speculate off"]
    return " ".join(parts)


def reasons(advice: Recommendation, measured: Measured, others: list[Prediction]) -> list[str]:
    """Explain each part of a recommendation; `others` are the predictions it was chosen from."""
    best, fastest = advice.best, advice.fastest
    choice = best.choice
    lines = [
        f"partition {choice.partition}: {why_partition(advice, measured)}. {PARTITION_MEANS}.",
        f"weights {choice.format.label}: {_why_format(best, others)}",
        f"codec {choice.codec.label}: {_why_codec(best)}",
        _why_guesses(best, measured.drafting, others),
    ]
    if fastest is not best:
        gain = fastest.tokens_per_second / best.tokens_per_second - 1
        lines.append(f"fastest of all would be {flags(fastest.choice)}: {gain:.0%} more, too little to be worth it.")
    if advice.too_large:
        lines.append(f"{advice.too_large} combinations were left out: they do not fit into the memory that is free.")
    return lines


def _same_but(best: Prediction, others: list[Prediction], field: str) -> list[Prediction]:
    names = {"partition", "format", "codec", "guesses"} - {field}
    return [one for one in others if all(getattr(one.choice, name) == getattr(best.choice, name) for name in names)]


def _why_format(best: Prediction, others: list[Prediction]) -> str:
    rivals = _same_but(best, others, "format")
    if len(rivals) == 1:
        return "the only format that was measured."
    quickest = max(rivals, key=lambda one: one.tokens_per_second)
    if quickest.tokens_per_second <= best.tokens_per_second:
        return f"the fastest here, {best.tokens_per_second:.1f} tokens/s; coarser numbers change the text a little."
    return f"{quickest.choice.format.label} would make {quickest.tokens_per_second:.1f} tokens/s of it, not worth it."


def _why_codec(best: Prediction) -> str:
    share = best.parts.wire / best.parts.total
    return f"the bytes take {share:.1%} of a token's time, {best.bytes_up:,.0f} up and {best.bytes_down:,.0f} down."


def _why_guesses(best: Prediction, drafting: Drafting, others: list[Prediction]) -> str:
    basis = (
        f"{drafting.acceptance:.0%} of the guesses right where all before were, "
        f"{1000 * drafting.seconds_per_guess:.2f} ms each ({drafting.source})"
    )
    if best.choice.guesses:
        plain = next(one for one in _same_but(best, others, "guesses") if one.choice.guesses == 0)
        gain = best.tokens_per_second / plain.tokens_per_second - 1
        return (
            f"{best.choice.guesses} guesses a round: {gain:.0%} faster than none, with {basis}. "
            "--speculate auto finds the number that pays by itself."
        )
    return f"no guesses: they would not pay here, with {basis}. --speculate auto also finds that out by itself."
