"""What a task consists of: examples, each a text to read and the text to learn, and the samples they become."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")
IGNORED = -100  # torch's cross_entropy leaves such labels out


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the answer to learn; the text trained on is `prompt + answer`, with nothing put in between.

    `choices` are all possible answers where the task has a fixed set (`answer` is one of them): such a task is answered
    by the likelihood of each choice, any other by greedy generation. `accepted` are further right answers, which scores
    count and training does not see. `group` names what is scored together (a MultiRC question). `label` is the class
    by which data is dealt out non-iid; it is empty where the task has none.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    group: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A chat. Every turn of the assistant is learned; the last turn is the assistant's, and it alone is scored."""

    messages: tuple[Message, ...]
    label: str = ""

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Passage:
    """Running text, learned as a whole; there is no answer to score, only its perplexity."""

    text: str
    label: str = ""


AnyExample = Example | Dialogue | Passage


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, of the same length, what to learn: `labels[i]` is `token_ids[i]` or `IGNORED`.

    As in transformers, labels are not shifted: the loss at position i - 1 is that of predicting `labels[i]`.
    """

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.labels), "one label for each token"

    @property
    def targets(self) -> int:
        """How many tokens are learned; the first token of a sample is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def choices(example: AnyExample) -> tuple[str, ...]:
    """All possible answers, or none where the answer is free text.

    With choices, the answer is the choice whose tokens and end token have together the highest probability behind the
    prompt (no choice gains by being the beginning of another); without, it is generated greedily up to an end token.
    """
    return example.choices if isinstance(example, Example) else ()
