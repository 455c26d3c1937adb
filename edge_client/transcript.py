"""The ids of a chat's next prompt: answers keep the ids they were generated with, only what follows is tokenised.

A chat is rendered anew as text for each turn. Tokenising that text again may cut an earlier answer into other tokens
than the model had made, and then everything behind the first difference would have to be computed, and sent, again.
So whoever keeps a chat keeps a `Known` per answer, and asks `next_ids` for the next prompt. Pure: no model, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
Encode = Callable[[str], list[int]]  # text to ids, special tokens in it recognised and none added


@dataclass(frozen=True, slots=True)
class Known:
    """The ids of a rendering and of the answer behind it: `ids` stands for the text `rendering + answer`."""

    rendering: str
    answer: str
    ids: tuple[int, ...]


def known_answer(
    rendering: str,
    prompt_ids: Sequence[int],
    answer: str,
    answer_ids: Sequence[int],
    *,
    end_ids: Collection[int],
    show: Callable[[Sequence[int]], str],
) -> Known:
    """Remember an answer; `end_ids` are the tokens that end one, `show` gives the text that ids add to the prompt.

    An end token is left out, because the template writes its own. An answer that was shortened (a stop string was cut
    off) is remembered without its ids: they stand for more than what the chat shows.
    """
    made = list(answer_ids)
    while made and made[-1] in end_ids:
        made.pop()
    # An answer that was broken off may end inside a character.
    if show(made).rstrip(REPLACEMENT) != answer.rstrip(REPLACEMENT):
        return Known(rendering, "", tuple(prompt_ids))
    return Known(rendering, answer, (*prompt_ids, *made))


def next_ids(rendering: str, known: Sequence[Known], encode: Encode) -> list[int]:
    """Give the ids of `rendering`, with those of the latest of `known` that it continues.

    Where the template changed what came before (another system message, reasoning of earlier turns left out), an
    earlier one is continued, or none, and the rest is tokenised: what the template writes is what the model expects.
    """
    for each in reversed(known):
        rest = _rest(rendering, each)
        if rest is not None:
            return [*each.ids, *_encode_behind(each.rendering + each.answer, rest, encode)]
    return encode(rendering)


def _rest(rendering: str, known: Known) -> str | None:
    """What `rendering` has behind the answer, or None if it does not continue it."""
    if not rendering.startswith(known.rendering):
        return None
    behind = rendering[len(known.rendering) :]
    if behind.startswith(known.answer):
        return behind[len(known.answer) :]
    # Templates trim answers, or set a space before them: no reason to compute them again.
    answer, bare = known.answer.strip(), behind.lstrip()
    return bare[len(answer) :] if bare.startswith(answer) else None


def _encode_behind(before: str, text: str, encode: Encode) -> list[int]:
    """Tokenise `text` as it stands behind `before`, where no token spans both; else on its own."""
    if not text:
        return []
    head, whole = encode(before), encode(before + text)
    return whole[len(head) :] if whole[: len(head)] == head else encode(text)
