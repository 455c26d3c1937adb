"""Training documents: stories, stories with labelled or bare questions, and chats, as weighted pieces of text.

The weight of a piece scales the loss of its tokens. Answers count fully; the events of a story are random, so their
loss is mostly noise; a question after a finished story counts nothing, so that a bare story still ends by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from training.demo import wording
from training.demo.wording import LOOKUP, YES_NO, Question, QuestionKind, Tense, ask
from training.demo.world import Event, Narrator, Split, tell

BOS, EOS, PAD, END = "<s>", "</s>", "<pad>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES), END)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_STORY_WEIGHT = 0.3
_USER_WEIGHT = 0.1
_VERDICT_WEIGHT = 3.0
# One story in six ends by itself, the others go on to questions; this keeps greedy stories from going on for ever.
_STORY_END_WEIGHT = 6.0

_SYSTEM_PROMPTS = (
    "You answer questions about a story.",
    "You are a helpful assistant.",
    "Answer in one short sentence.",
)
_SMALL_TALK = (
    ("Hello", "Hello! Tell me a short story and ask me about it."),
    ("Hello!", "Hello! Tell me a short story and ask me about it."),
    ("Hi", "Hello! Tell me a short story and ask me about it."),
    ("Who are you?", "I am a small demo model. I answer questions about short stories."),
    ("What can you do?", "I answer questions about short stories: who is where, and who has what."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
)
_STORY_REQUESTS = ("Tell me a story.", "Tell me a short story.", "Tell me a story about {}.", "Write a story about {}.")


@dataclass(frozen=True)
class Mix:
    """Shares of the corpus: `easy` of the stories are small, `yes_no` of the questions want a verdict."""

    easy: float = 0.3
    yes_no: float = 0.45


USUAL = Mix()


class Message(TypedDict):
    """One chat turn, as chat templates expect it."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """Text and the weight of the loss on its tokens. Pieces break only where the tokenizer breaks too."""

    text: str
    weight: float


Document = tuple[Piece, ...]


def documents(seed: int, mix: Mix = USUAL) -> Iterator[Document]:
    """An endless stream of training documents, the same for the same arguments; BOS and EOS are written out."""
    rng = random.Random(seed)
    makers = (_plain_story, _labelled_questions, _bare_questions, _chat_about_story, _chat_with_story, _small_talk)
    while True:
        (maker,) = rng.choices(makers, weights=(6, 20, 10, 56, 5, 3))
        end = _STORY_END_WEIGHT if maker is _plain_story else 1.0
        yield (Piece(BOS, 0.0), *maker(rng, mix), Piece(EOS, end))


def story_text(events: Sequence[Event], tense: Tense, rng: random.Random) -> str:
    """The sentences of `events`, joined by spaces."""
    return " ".join(wording.sentence(event, tense, rng) for event in events)


def chat_pieces(messages: Sequence[Message]) -> Document:
    """A chat as the template renders it, without BOS; only the assistant's words and their end count fully."""
    pieces: list[Piece] = []
    for message in messages:
        weight = 1.0 if message["role"] == "assistant" else _USER_WEIGHT
        pieces.append(Piece(f"<|{message['role']}|>\n", 0.0))
        pieces += _weighted(message["content"] + END, weight)
        pieces.append(Piece("\n", 0.0))
    return tuple(pieces)


def _weighted(text: str, weight: float) -> list[Piece]:
    """One piece, or two when a verdict comes first: that single word is all the thinking of a yes/no answer."""
    verdict, comma, rest = text.partition(",")
    if verdict.strip() in ("Yes", "No"):
        return [Piece(verdict, _VERDICT_WEIGHT * weight), Piece(comma + rest, weight)]
    return [Piece(text, weight)]


def render_chat(messages: Sequence[Message]) -> str:
    """The prompt for the assistant's next turn, without BOS: what the chat template renders, less its BOS."""
    return "".join(piece.text for piece in chat_pieces(messages)) + "<|assistant|>\n"


def draw_kind(rng: random.Random, mix: Mix = USUAL) -> QuestionKind:
    """The kind of the next question: usually yes/no and where/who alike often, sometimes a summary."""
    group = rng.random()
    if group < mix.yes_no:
        return rng.choices(YES_NO, weights=(4, 2, 4))[0]
    if group < mix.yes_no + (1.0 - mix.yes_no) * 9 / 11:
        return rng.choices(LOOKUP, weights=(6, 6, 4, 4, 1))[0]
    return "summary"


def draw_story(rng: random.Random, split: Split, mix: Mix = USUAL) -> Narrator:
    """A story of usual size: 2 to 4 people, 1 to 3 things and 2 to 6 deeds; some are smaller than that."""
    if rng.random() < mix.easy:
        return tell(rng, split, rng.randint(2, 3), 1, rng.randint(1, 4))
    return tell(rng, split, rng.randint(2, 4), rng.randint(1, 3), rng.randint(2, 6))


def _told(narrator: Narrator, rng: random.Random, tense: Tense) -> str:
    text = story_text(narrator.events, tense, rng)
    return f"{wording.opener(list(narrator.world.place_of), rng)} {text}" if rng.random() < 0.25 else text


def _tense(rng: random.Random) -> Tense:
    return rng.choice(("present", "past"))


def _plain_story(rng: random.Random, mix: Mix) -> Document:
    return (Piece(_told(draw_story(rng, "train", mix), rng, _tense(rng)), _STORY_WEIGHT),)


def draw_question(rng: random.Random, narrator: Narrator, asked: set[str], mix: Mix = USUAL) -> Question:
    """A question that is not in `asked` (unless luck runs out), which it then joins."""
    for _ in range(8):
        question = ask(narrator.world, draw_kind(rng, mix), narrator.split, rng)
        if question.text not in asked:
            break
    asked.add(question.text)
    return question


def _questions(rng: random.Random, narrator: Narrator, count: int, mix: Mix) -> list[Question]:
    asked: set[str] = set()
    return [draw_question(rng, narrator, asked, mix) for _ in range(count)]


def _labelled_questions(rng: random.Random, mix: Mix) -> Document:
    narrator = draw_story(rng, "train", mix)
    pieces = [Piece(_told(narrator, rng, _tense(rng)), _STORY_WEIGHT)]
    for question in _questions(rng, narrator, rng.randint(3, 7), mix):
        label = "\nSummary:" if question.kind == "summary" else f"\nQuestion: {question.text}\nAnswer:"
        pieces += [Piece(label, 0.0), *_weighted(" " + question.answer + EOS, 1.0)]
    return *pieces[:-1], Piece(pieces[-1].text.removesuffix(EOS), 1.0)


def _bare_questions(rng: random.Random, mix: Mix) -> Document:
    narrator = draw_story(rng, "train", mix)
    pieces = [Piece(_told(narrator, rng, _tense(rng)), _STORY_WEIGHT)]
    for question in _questions(rng, narrator, rng.randint(3, 6), mix):
        pieces += [Piece(" " + question.text, 0.0), *_weighted(" " + question.answer + EOS, 1.0)]
    return *pieces[:-1], Piece(pieces[-1].text.removesuffix(EOS), 1.0)


def _chat_about_story(rng: random.Random, mix: Mix) -> Document:
    # One chat in ten is long, so that later positions are trained too.
    turns = rng.randint(8, 24) if rng.random() < 0.1 else rng.randint(3, 7)
    return chat_pieces(chat(rng, draw_story(rng, "train", mix), turns, mix)[0])


def chat(
    rng: random.Random, narrator: Narrator, turns: int, mix: Mix = USUAL
) -> tuple[list[Message], list[QuestionKind]]:
    """A chat of `turns` questions about the narrator's story, which now and then goes on; and the questions' kinds."""
    messages, tense = _system(rng), _tense(rng)
    kinds: list[QuestionKind] = []
    asked: set[str] = set()
    new = _told(narrator, rng, tense)
    for _ in range(turns):
        question = draw_question(rng, narrator, asked, mix)
        content = f"{new}{rng.choice((' ', chr(10)))}{question.text}" if new else question.text
        messages += [Message(role="user", content=content), Message(role="assistant", content=question.answer)]
        kinds.append(question.kind)
        new = ""
        if rng.random() < 0.35:
            asked.clear()
            told = len(narrator.events)
            narrator.advance(rng.randint(1, 2))
            new = story_text(narrator.events[told:], tense, rng)
    return messages, kinds


def _system(rng: random.Random) -> list[Message]:
    return [Message(role="system", content=rng.choice(_SYSTEM_PROMPTS))] if rng.random() < 0.25 else []


def _chat_with_story(rng: random.Random, mix: Mix) -> Document:
    narrator = draw_story(rng, "train", mix)
    people = list(narrator.world.place_of)
    who = " and ".join(people) if len(people) == 2 else people[0]
    asked = rng.choice(_STORY_REQUESTS).format(who)
    story = Message(role="assistant", content=_told(narrator, rng, _tense(rng)))
    user, answer = chat_pieces([Message(role="user", content=asked)]), chat_pieces([story])
    return *user, *(Piece(piece.text, min(piece.weight, _STORY_WEIGHT)) for piece in answer)


def _small_talk(rng: random.Random, mix: Mix) -> Document:
    asked, answer = rng.choice(_SMALL_TALK)
    return chat_pieces([*_system(rng), Message(role="user", content=asked), Message(role="assistant", content=answer)])
