"""A seeded small world: people walk between places and carry things; every sentence and answer about it is true.

Rules: a person is in one place and carries at most one thing; a thing lies in one place or is carried; one can only
take what lies in the same place, and only give to somebody who is there and has free hands.

Held-out stories come in two kinds. A split of ``"story"`` has stories whose facts hash into a bucket that training
skips. A split of ``"pair"`` has stories in which somebody is in a place where training never puts that person.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

NAMES = ("Mia", "Tom", "Anna", "Ben", "Lily", "Sam", "Zoe", "Max", "Emma", "Leo", "Nora", "Jack")
PLACES = ("kitchen", "garden", "park", "school", "library", "bedroom", "hall", "garage", "market", "barn")
THINGS = ("ball", "book", "lamp", "key", "pear", "cup", "hat", "kite", "drum", "coin")

Split = Literal["train", "story", "pair"]
EventKind = Literal["stand", "lie", "move", "take", "leave", "give"]

_PAIR_BUCKETS = 10
_STORY_BUCKETS = 20


@dataclass(frozen=True)
class Event:
    """One fact of a story.

    ``people`` are those it is about; for ``"give"`` the giver and then the receiver. ``thing`` is empty for ``"stand"``
    and ``"move"``; ``place`` is empty for ``"take"`` and ``"give"``.
    """

    kind: EventKind
    people: tuple[str, ...] = ()
    thing: str = ""
    place: str = ""


@dataclass
class World:
    """Who is where and who has what. Dictionaries keep the order in which people and things entered the story.

    Every known thing is a key of exactly one of ``holder_of`` and ``lies_in``.
    """

    place_of: dict[str, str] = field(default_factory=dict)
    holder_of: dict[str, str] = field(default_factory=dict)
    lies_in: dict[str, str] = field(default_factory=dict)

    def apply(self, event: Event) -> None:
        """Change the world by `event`, which must be possible in it."""
        if event.kind in ("stand", "move"):
            for person in event.people:
                self.place_of[person] = event.place
        elif event.kind in ("lie", "leave"):
            self.holder_of.pop(event.thing, None)
            self.lies_in[event.thing] = event.place
        else:
            self.lies_in.pop(event.thing, None)
            self.holder_of[event.thing] = event.people[-1]

    def thing_of(self, person: str) -> str | None:
        """What `person` carries, if anything."""
        return next((thing for thing, holder in self.holder_of.items() if holder == person), None)

    def place_of_thing(self, thing: str) -> str:
        """Where `thing` is, carried or not."""
        return self.lies_in[thing] if thing in self.lies_in else self.place_of[self.holder_of[thing]]

    def things(self) -> list[str]:
        """All known things, in a fixed order that does not tell where they are."""
        return sorted([*self.holder_of, *self.lies_in])


def is_held_out_pair(person: str, place: str) -> bool:
    """Whether training never puts `person` in `place`, in stories and in questions alike."""
    return zlib.crc32(f"{person} in {place}".encode()) % _PAIR_BUCKETS == 0


def is_held_out_story(events: Iterable[Event]) -> bool:
    """Whether training skips the story with these facts, whatever its wording."""
    facts = ";".join(f"{e.kind},{'+'.join(e.people)},{e.thing},{e.place}" for e in events)
    return zlib.crc32(facts.encode()) % _STORY_BUCKETS == 0


def places_for(people: Sequence[str], split: Split) -> list[str]:
    """The places where all of `people` may be in stories of this split."""
    if split == "pair":
        return list(PLACES)
    return [place for place in PLACES if not any(is_held_out_pair(person, place) for person in people)]


class Narrator:
    """Makes up one story event by event. All choices come from `rng`, so a seed fixes the story on every platform."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split: Split = split
        self.world = World()
        self.events: list[Event] = []

    def introduce(self, people: int, things: int) -> None:
        """Add `people` persons and `things` things, each with the sentence that says where they are."""
        names = self.rng.sample(NAMES, people)
        for name in names:
            self._add(Event("stand", (name,), place=self.rng.choice(places_for((name,), self.split))))
        # Things lie where people are, half of the time: otherwise hardly anything is ever picked up.
        for thing in self.rng.sample(THINGS, things):
            near = self.world.place_of[self.rng.choice(names)]
            self._add(Event("lie", thing=thing, place=near if self.rng.random() < 0.6 else self.rng.choice(PLACES)))

    def advance(self, count: int) -> None:
        """Let `count` more events happen."""
        for _ in range(count):
            # A deed on what was just handled would often only undo it.
            options = [deed for deed in self._possible_deeds() if deed.thing != self.events[-1].thing]
            self._add(self.rng.choice(options) if options and self.rng.random() < 0.55 else self._move())

    def _add(self, event: Event) -> None:
        self.world.apply(event)
        self.events.append(event)

    def _move(self) -> Event:
        people = self.rng.sample(list(self.world.place_of), 2 if self.rng.random() < 0.1 else 1)
        here = {self.world.place_of[person] for person in people}
        targets = [place for place in places_for(people, self.split) if place not in here]
        # Half of the walks lead to where something or somebody is, so that people and things meet.
        busy = {*self.world.place_of.values(), *self.world.lies_in.values()}
        meeting = [place for place in targets if place in busy]
        where = self.rng.choice(meeting if meeting and self.rng.random() < 0.5 else targets)
        return Event("move", tuple(people), place=where)

    def _possible_deeds(self) -> list[Event]:
        world, deeds = self.world, []
        for person, place in world.place_of.items():
            carried = world.thing_of(person)
            if carried is None:
                here = [thing for thing in world.things() if world.lies_in.get(thing) == place]
                deeds += [Event("take", (person,), thing) for thing in here]
                continue
            deeds.append(Event("leave", (person,), carried, place))
            for other, where in world.place_of.items():
                if other != person and where == place and world.thing_of(other) is None:
                    deeds.append(Event("give", (person, other), carried))
        return deeds


def tell(rng: random.Random, split: Split, people: int, things: int, deeds: int) -> Narrator:
    """Make up stories until one belongs to `split`; returns its narrator, which can go on with the same story."""
    while True:
        narrator = Narrator(rng, split)
        narrator.introduce(people, things)
        narrator.advance(deeds)
        if _belongs(narrator.events, split):
            return narrator


def _belongs(events: Sequence[Event], split: Split) -> bool:
    if split == "pair":
        return any(is_held_out_pair(p, e.place) for e in events if e.kind in ("stand", "move") for p in e.people)
    return is_held_out_story(events) == (split == "story")
