"""The English of the small world: sentences for events, questions with their true answers, one-line summaries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from training.demo.world import NAMES, PLACES, THINGS, Event, Split, World, places_for

Tense = Literal["present", "past"]
YesNoKind = Literal["person_at", "thing_at", "has"]
LookupKind = Literal["where_person", "where_thing", "who_has", "what_has", "unknown"]
QuestionKind = Literal[YesNoKind, LookupKind, "summary"]

YES_NO: tuple[YesNoKind, ...] = get_args(YesNoKind)
LOOKUP: tuple[LookupKind, ...] = get_args(LookupKind)
SUMMARY_QUESTIONS = ("Summarize the story.", "Summarize the story in one line.", "Give me a summary.")
UNKNOWN_ANSWER = "I do not know."


@dataclass(frozen=True)
class Question:
    """A question about a world, and its true answer in the one wording that the model is taught."""

    kind: QuestionKind
    text: str
    answer: str


def sentence(event: Event, tense: Tense, rng: random.Random) -> str:
    """One English sentence that states `event`."""
    return rng.choice(_patterns(event, tense)).format(
        one=event.people[0] if event.people else "",
        all=" and ".join(event.people),
        two=event.people[-1] if event.people else "",
        thing=event.thing,
        place=event.place,
    )


def opener(people: Sequence[str], rng: random.Random) -> str:
    """A first sentence that says nothing about places, for stories that begin like stories."""
    names = " and ".join([", ".join(people[:-1]), people[-1]] if len(people) > 1 else people)
    return rng.choice(
        (
            f"Once upon a time, {names} had a busy day.",
            f"One sunny morning, {names} wanted to play.",
            f"This is a story about {names}.",
        )
    )


def _patterns(event: Event, tense: Tense) -> tuple[str, ...]:
    past = tense == "past"
    if event.kind == "stand":
        return ("{one} was in the {place}.",) if past else ("{one} is in the {place}.",)
    if event.kind == "lie":
        be = "was" if past else "is"
        return f"There {be} a {{thing}} in the {{place}}.", f"The {{thing}} {be} in the {{place}}."
    if event.kind == "move":
        return tuple(f"{{all}} {verb} to the {{place}}." for verb in _walking(past, len(event.people) > 1))
    if event.kind == "take":
        taking = ("picked up", "took", "grabbed") if past else ("picks up", "takes", "grabs")
        return tuple(f"{{one}} {verb} the {{thing}}." for verb in taking)
    if event.kind == "leave":
        leaving = ("left", "dropped", "put down") if past else ("leaves", "drops", "puts down")
        return tuple(f"{{one}} {verb} the {{thing}} in the {{place}}." for verb in leaving)
    giving = ("gave", "handed") if past else ("gives", "hands")
    return tuple(f"{{one}} {verb} the {{thing}} to {{two}}." for verb in giving)


def _walking(past: bool, plural: bool) -> tuple[str, ...]:
    if past:
        return "went", "walked", "ran", "moved"
    return ("go", "walk", "run", "move") if plural else ("goes", "walks", "runs", "moves")


def ask(world: World, kind: QuestionKind, split: Split, rng: random.Random) -> Question:
    """A question of this kind about `world`, with its true answer. Yes and No are equally likely where both exist."""
    if kind == "summary":
        return Question(kind, rng.choice(SUMMARY_QUESTIONS), summary(world))
    if kind in YES_NO:
        return _ask_yes_no(world, kind, split, rng)
    if kind == "unknown":
        strangers = [f"Where is {name}?" for name in NAMES if name not in world.place_of]
        lost = [f"Where is the {thing}?" for thing in THINGS if thing not in world.things()]
        return Question(kind, rng.choice(strangers + lost), UNKNOWN_ANSWER)
    person, thing = rng.choice(list(world.place_of)), rng.choice(world.things())
    if kind == "where_person":
        text = rng.choice(("Where is {}?", "Where is {} now?")).format(person)
        return Question(kind, text, _place_fact(world, person))
    if kind == "where_thing":
        text = rng.choice(("Where is the {}?", "Where is the {} now?")).format(thing)
        return Question(kind, text, thing_fact(world, thing))
    if kind == "who_has":
        holder = world.holder_of.get(thing, "Nobody")
        return Question(kind, f"Who has the {thing}?", f"{holder} has the {thing}.")
    return Question(kind, f"What does {person} have?", _hands_fact(world, person))


def summary(world: World) -> str:
    """One line: where everybody is, in the order of the story, and what they carry."""
    facts = []
    for person, place in world.place_of.items():
        carried = world.thing_of(person)
        facts.append(f"{person} is in the {place}" + (f" with the {carried}" if carried else ""))
    return ", ".join(facts[:-1]) + (" and " if len(facts) > 1 else "") + facts[-1] + "."


def thing_fact(world: World, thing: str) -> str:
    """Where a thing is; for a carried thing the holder is named first."""
    if thing in world.lies_in:
        return f"The {thing} is in the {world.lies_in[thing]}."
    holder = world.holder_of[thing]
    return f"{holder} has the {thing} in the {world.place_of[holder]}."


def _place_fact(world: World, person: str) -> str:
    return f"{person} is in the {world.place_of[person]}."


def _hands_fact(world: World, person: str) -> str:
    carried = world.thing_of(person)
    return f"{person} has the {carried}." if carried else f"{person} has nothing."


def _ask_yes_no(world: World, kind: QuestionKind, split: Split, rng: random.Random) -> Question:
    truth = rng.random() < 0.5
    person, thing = rng.choice(list(world.place_of)), rng.choice(world.things())
    if kind == "person_at":
        place = _claimed_place(world, world.place_of[person], places_for((person,), split), truth, rng)
        return _verdict(kind, f"Is {person} in the {place}?", truth, _place_fact(world, person))
    if kind == "thing_at":
        place = _claimed_place(world, world.place_of_thing(thing), PLACES, truth, rng)
        return _verdict(kind, f"Is the {thing} in the {place}?", truth, thing_fact(world, thing))
    holder = world.holder_of.get(thing)
    if truth and world.holder_of:
        thing, holder = rng.choice(list(world.holder_of.items()))
        return _verdict(kind, f"Does {holder} have the {thing}?", True, f"{holder} has the {thing}.")
    person = rng.choice([other for other in world.place_of if other != holder])
    fact = f"{holder} has the {thing}." if holder else thing_fact(world, thing)
    return _verdict(kind, f"Does {person} have the {thing}?", False, fact)


def _claimed_place(world: World, real: str, possible: Sequence[str], truth: bool, rng: random.Random) -> str:
    if truth:
        return real
    wrong = [place for place in possible if place != real]
    # A place that the story mentions is the harder wrong guess.
    mentioned = {*world.place_of.values(), *world.lies_in.values()}
    near = [place for place in wrong if place in mentioned]
    return rng.choice(near if near and rng.random() < 0.5 else wrong)


def _verdict(kind: QuestionKind, text: str, truth: bool, fact: str) -> Question:
    told = fact[0].lower() + fact[1:] if fact.startswith("The ") else fact
    return Question(kind, text, f"{'Yes' if truth else 'No'}, {told}")
