"""The demo's stories and answers: true by an independent reading of the English, repeatable, held out as promised."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.demo import wording
from training.demo.corpus import BOS, EOS, chat, documents, draw_story, story_text
from training.demo.evaluate import Case, Tally, cases, grade, score
from training.demo.wording import LOOKUP, UNKNOWN_ANSWER, YES_NO, ask
from training.demo.world import (
    NAMES,
    PLACES,
    THINGS,
    Event,
    Split,
    World,
    is_held_out_pair,
    is_held_out_story,
    places_for,
    tell,
)

SEEDS = st.integers(0, 2**32)
SPLITS = st.sampled_from(["train", "story", "pair"])
KINDS = (*YES_NO, *LOOKUP, "summary")

NAME, PLACE, THING = ("|".join(words) for words in (NAMES, PLACES, THINGS))
AT = re.compile(rf"({NAME}) (?:is|was) in the ({PLACE})\.")
LIES = re.compile(rf"(?:There (?:is|was) a|The) ({THING}) (?:(?:is|was) )?in the ({PLACE})\.")
GOES = re.compile(
    rf"({NAME})(?: and ({NAME}))? (?:go|goes|went|walks?|walked|runs?|ran|moves?|moved) to the ({PLACE})\."
)
TAKES = re.compile(rf"({NAME}) (?:picks up|picked up|takes|took|grabs|grabbed) the ({THING})\.")
LEAVES = re.compile(rf"({NAME}) (?:leaves|left|drops|dropped|puts down|put down) the ({THING}) in the ({PLACE})\.")
GIVES = re.compile(rf"({NAME}) (?:gives|gave|hands|handed) the ({THING}) to ({NAME})\.")


class Reader:
    """Reads sentences and answers questions by regular expressions only; refuses what cannot happen."""

    def __init__(self) -> None:
        self.at: dict[str, str] = {}
        self.thing: dict[str, str] = {}

    def read(self, text: str) -> None:
        for sentence in re.findall(r"[^.?]+\.", text):
            self.hear(sentence.strip())

    def hear(self, sentence: str) -> None:
        if found := AT.fullmatch(sentence):
            self.at[found[1]] = found[2]
        elif found := LIES.fullmatch(sentence):
            self.thing[found[1]] = found[2]
        elif found := GOES.fullmatch(sentence):
            for name in filter(None, (found[1], found[2])):
                assert self.at[name] != found[3], sentence
                self.at[name] = found[3]
        elif found := TAKES.fullmatch(sentence):
            assert self.thing[found[2]] == self.at[found[1]], sentence
            assert found[1] not in self.thing.values(), sentence
            self.thing[found[2]] = found[1]
        elif found := LEAVES.fullmatch(sentence):
            assert (self.thing[found[2]], self.at[found[1]]) == (found[1], found[3]), sentence
            self.thing[found[2]] = found[3]
        elif found := GIVES.fullmatch(sentence):
            assert self.thing[found[2]] == found[1], sentence
            assert self.at[found[1]] == self.at[found[3]], sentence
            assert found[3] not in self.thing.values(), sentence
            self.thing[found[2]] = found[3]
        else:
            pytest.fail(f"cannot read: {sentence}")

    def hands(self, name: str) -> str | None:
        return next((thing for thing, where in self.thing.items() if where == name), None)

    def whereabouts(self, thing: str) -> str:
        where = self.thing[thing]
        return (
            f"{where} has the {thing} in the {self.at[where]}."
            if where in self.at
            else f"The {thing} is in the {where}."
        )

    def answer(self, question: str) -> str:
        words = question.rstrip("?.").removesuffix(" now").split()
        last = words[-1]
        if question in wording.SUMMARY_QUESTIONS:
            return self.summary()
        if words[0] == "Where":
            if last in self.at:
                return f"{last} is in the {self.at[last]}."
            return self.whereabouts(last) if last in self.thing else UNKNOWN_ANSWER
        if words[0] == "Who":
            return f"{self.thing[last] if self.thing[last] in self.at else 'Nobody'} has the {last}."
        if words[0] == "What":
            held = self.hands(words[2])
            return f"{words[2]} has {'the ' + held if held else 'nothing'}."
        return self.verdict(words)

    def verdict(self, words: list[str]) -> str:
        last = words[-1]
        if words[0] == "Does":
            holder = self.thing[last]
            fact = f"{holder} has the {last}." if holder in self.at else self.whereabouts(last)
            return self.say(holder == words[1], fact)
        if words[1] == "the":
            where = self.thing[words[2]]
            return self.say(self.at.get(where, where) == last, self.whereabouts(words[2]))
        return self.say(self.at[words[1]] == last, f"{words[1]} is in the {self.at[words[1]]}.")

    @staticmethod
    def say(truth: bool, fact: str) -> str:
        return f"{'Yes' if truth else 'No'}, {fact.replace('The ', 'the ')}"

    def summary(self) -> str:
        facts = []
        for name, place in self.at.items():
            held = self.hands(name)
            facts.append(f"{name} is in the {place}" + (f" with the {held}" if held else ""))
        return f"{', '.join(facts[:-1])} and {facts[-1]}."


@given(SEEDS, SPLITS, st.sampled_from(["present", "past"]), st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_answers_are_what_an_independent_reader_says(seed: int, split: Split, tense: str, kind: str) -> None:
    rng = random.Random(seed)
    narrator = draw_story(rng, split)
    reader = Reader()
    reader.read(story_text(narrator.events, tense, rng))
    question = ask(narrator.world, kind, split, rng)
    assert reader.answer(question.text) == question.answer


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_chats_stay_true_while_their_story_goes_on(seed: int, turns: int) -> None:
    rng = random.Random(seed)
    messages, kinds = chat(rng, draw_story(rng, "train"), turns)
    turns_only = [message for message in messages if message["role"] != "system"]
    assert len(turns_only) == 2 * len(kinds) == 2 * turns
    reader = Reader()
    for asked, answered in zip(turns_only[::2], turns_only[1::2], strict=True):
        told, question = split_question(asked["content"])
        reader.read(re.sub(r"^(Once|One|This)[^.]+\.", "", told))
        assert reader.answer(question) == answered["content"]


def split_question(content: str) -> tuple[str, str]:
    for question in wording.SUMMARY_QUESTIONS:
        if content.endswith(question):
            return content.removesuffix(question), question
    start = max(content.rfind(". ") + 2, content.rfind("\n") + 1, 0) if "." in content else 0
    return content[:start], content[start:]


@given(SEEDS, st.integers(2, 4), st.integers(1, 3), st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_training_stories_keep_clear_of_what_is_held_out(seed: int, people: int, things: int, deeds: int) -> None:
    narrator = tell(random.Random(seed), "train", people, things, deeds)
    assert not is_held_out_story(narrator.events)
    narrator.advance(5)
    for event in narrator.events:
        if event.kind in ("stand", "move"):
            assert not any(is_held_out_pair(person, event.place) for person in event.people)


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_training_questions_never_claim_a_held_out_pair(seed: int) -> None:
    rng = random.Random(seed)
    question = ask(draw_story(rng, "train").world, "person_at", "train", rng)
    _, person, _, _, place = question.text.rstrip("?").split()
    assert not is_held_out_pair(person, place)


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_held_out_stories_are_what_they_claim(seed: int) -> None:
    rng = random.Random(seed)
    assert is_held_out_story(draw_story(rng, "story").events)
    moves = [event for event in draw_story(rng, "pair").events if event.kind in ("stand", "move")]
    assert any(is_held_out_pair(person, event.place) for event in moves for person in event.people)


def test_some_pairs_are_held_out_and_every_pair_of_people_can_still_meet() -> None:
    share = sum(is_held_out_pair(name, place) for name in NAMES for place in PLACES) / (len(NAMES) * len(PLACES))
    assert 0.04 < share < 0.2
    assert all(len(places_for(two, "train")) >= 3 for two in itertools.combinations(NAMES, 2))


def test_a_seed_fixes_the_corpus_on_every_platform() -> None:
    once, again = (list(itertools.islice(documents(3), 50)) for _ in range(2))
    assert once == again
    assert once != list(itertools.islice(documents(4), 50))
    # A known story: random.Random promises this sequence for ever, and so do we.
    story = tell(random.Random(0), "train", 2, 1, 2)
    assert story.events == [
        Event("stand", ("Zoe",), place="kitchen"),
        Event("stand", ("Jack",), place="library"),
        Event("lie", thing="drum", place="library"),
        Event("move", ("Jack",), place="hall"),
        Event("move", ("Zoe",), place="hall"),
    ]


def test_documents_begin_with_bos_and_end_with_eos() -> None:
    for document in itertools.islice(documents(1), 200):
        assert document[0].text == BOS
        assert document[-1].text == EOS
        assert all(piece.weight >= 0.0 for piece in document)


def test_yes_and_no_are_about_equally_likely() -> None:
    rng = random.Random(0)
    for kind in ("person_at", "thing_at"):
        said = [ask(draw_story(rng, "train").world, kind, "train", rng).answer[:2] for _ in range(400)]
        assert 0.4 < said.count("Ye") / len(said) < 0.6


def test_a_given_thing_changes_hands() -> None:
    world = World()
    for event in (
        Event("stand", ("Mia",), place="park"),
        Event("stand", ("Tom",), place="park"),
        Event("lie", thing="key", place="park"),
        Event("take", ("Mia",), "key"),
        Event("give", ("Mia", "Tom"), "key"),
        Event("move", ("Tom",), place="barn"),
    ):
        world.apply(event)
    assert (world.thing_of("Mia"), world.thing_of("Tom"), world.place_of_thing("key")) == (None, "key", "barn")
    assert wording.summary(world) == "Mia is in the park and Tom is in the barn with the key."


def test_scoring_counts_first_words_for_verdicts_and_whole_lines_for_the_rest() -> None:
    verdict = Case("person_at", "", "No, Mia is in the park.")
    place = Case("where_person", "", "Mia is in the park.")
    assert verdict.is_right(" No, Mia is in the barn.\nmore")
    assert not verdict.is_right("Yes, Mia is in the park.")
    assert place.is_right(" Mia is in the park.\nQuestion:")
    assert not place.is_right("Mia is in the barn.")
    assert not place.is_right("")
    tallies = grade([verdict, place], ["No.", ""])
    assert (tallies["yes/no"], tallies["where/who"]) == (Tally(1, 1), Tally(0, 1))


def test_an_answerer_that_knows_everything_scores_everything() -> None:
    asked = cases(5, 40, "pair", "chat") + cases(5, 40, "story", "plain")
    known = {case.prompt: case.answer for case in asked}
    tallies = score(known.__getitem__, asked)
    assert sum(tallies[group].total for group in ("yes/no", "where/who", "summary")) == 80
    assert all(tally.accuracy == 1.0 for tally in tallies.values())
    assert cases(5, 40, "pair", "chat") == asked[:40]
