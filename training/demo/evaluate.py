"""Held-out accuracy of the demo model: yes/no questions, where/who questions and one-line summaries.

`cases` makes questions that training cannot have seen, `score` asks them through any ``answer(prompt) -> text``. A
prompt is text without BOS; special tokens in it (chats) must be parsed. The answer is the greedy continuation up to the
first end token, special tokens left out.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from split_llama.demo import demo_model_path
from training.demo.corpus import chat, draw_question, draw_story, render_chat, story_text
from training.demo.wording import LOOKUP, YES_NO, QuestionKind
from training.demo.world import Split

Style = Literal["plain", "chat"]
Group = Literal["yes/no", "where/who", "summary"]

HELD_OUT: tuple[Split, ...] = ("story", "pair")
STYLES: tuple[Style, ...] = ("plain", "chat")
GROUPS: tuple[Group, ...] = ("yes/no", "where/who", "summary")
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One held-out question: the prompt to continue, and the true answer."""

    kind: QuestionKind
    prompt: str
    answer: str

    @property
    def group(self) -> Group:
        """Which of the reported accuracies the case counts for."""
        if self.kind in YES_NO:
            return "yes/no"
        return "where/who" if self.kind in LOOKUP else "summary"

    def is_right(self, text: str) -> bool:
        """Whether the first line of `text` answers the case: the word Yes or No, or the whole line otherwise."""
        line = (text.strip().splitlines() or [""])[0].strip()
        if self.group == "yes/no":
            return line.split(",")[0].rstrip(".") == self.answer.split(",")[0]
        return line == self.answer


@dataclass(frozen=True)
class Tally:
    """How many of `total` cases were answered right."""

    right: int = 0
    total: int = 0

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 when there are no cases."""
        return self.right / self.total if self.total else 0.0

    def plus(self, right: bool) -> Tally:
        """This tally with one more case."""
        return Tally(self.right + right, self.total + 1)


def cases(seed: int, count: int, split: Split, style: Style) -> list[Case]:
    """`count` questions about held-out stories, the same for the same arguments.

    ``"plain"`` is a story with one labelled question. ``"chat"`` is a chat of one to five turns, in which the story may
    go on and earlier turns carry the true answers; the last turn is the case.
    """
    rng = random.Random(f"{split}/{style}/{seed}")
    make = _plain_case if style == "plain" else _chat_case
    return [make(rng, split) for _ in range(count)]


def grade(asked: Sequence[Case], answers: Sequence[str]) -> dict[str, Tally]:
    """Tallies of the answers by group and by kind of question."""
    tallies: dict[str, Tally] = {group: Tally() for group in GROUPS}
    for case, text in zip(asked, answers, strict=True):
        for name in dict.fromkeys((case.group, case.kind)):
            tallies[name] = tallies.get(name, Tally()).plus(case.is_right(text))
    return tallies


def score(answer: Callable[[str], str], asked: Sequence[Case]) -> dict[str, Tally]:
    """`grade` of what `answer` says to each case's prompt."""
    return grade(asked, [answer(case.prompt) for case in asked])


def _plain_case(rng: random.Random, split: Split) -> Case:
    narrator = draw_story(rng, split)
    text = story_text(narrator.events, rng.choice(("present", "past")), rng)
    question = draw_question(rng, narrator, set())
    label = "\nSummary:" if question.kind == "summary" else f"\nQuestion: {question.text}\nAnswer:"
    return Case(question.kind, text + label, question.answer)


def _chat_case(rng: random.Random, split: Split) -> Case:
    messages, kinds = chat(rng, draw_story(rng, split), rng.randint(1, 5))
    return Case(kinds[-1], render_chat(messages[:-1]), messages[-1]["content"])


def table(tallies: dict[str, Tally]) -> str:
    """The tallies as lines of a Markdown table."""
    rows = [f"| {name} | {t.accuracy:.1%} | {t.right} / {t.total} |" for name, t in tallies.items()]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a model folder with plain transformers and print one table for each split, style and noise."""
    from training.demo.generate import Generator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="model folder (default: the bundled one)")
    parser.add_argument("--count", type=int, default=1000, help="questions for each table (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the held-out stories (default: 1)")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.0, 0.025], help="noise after the first block")
    options = parser.parse_args(arguments)
    for sigma in options.sigma:
        generator = Generator.load(options.model, sigma)
        for split, style in product(HELD_OUT, STYLES):
            asked = cases(options.seed, options.count, split, style)
            answers = generator.answers([case.prompt for case in asked], MAX_ANSWER_TOKENS)
            sys.stdout.write(f"\nsplit {split}, {style}, sigma {sigma}\n{table(grade(asked, answers))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
