"""A small task for the bundled demo model: the code word of the place where somebody is.

The model knows its world (who is in which place), and its words, but nothing in it says which word stands for which
place: it answers the new question with a sentence of its own, and guesses among the code words at chance. It has to
learn one new fact for each of the ten places, and to answer with it. A prompt and its answer:

    Mia is in the kitchen. Tom is in the park. Mia goes to the hall.
    Question: Where is Mia?
    Answer: Mia is in the hat.

Stories are held out as the demo's own evaluation holds them out: the model has seen none of the test's.
"""

from __future__ import annotations

import random
from typing import Literal

from training.demo.corpus import story_text
from training.demo.world import PLACES, Narrator, Split, tell
from training.tasks.examples import Example

Part = Literal["train", "test"]

# Words the model knows: a word it never saw has no place of its own in its (frozen) head.
CODES = dict(zip(PLACES, ("lamp", "coin", "pear", "ball", "kite", "drum", "hat", "cup", "key", "book"), strict=True))


def demo_examples(part: Part, count: int, seed: int = 0) -> list[Example]:
    """`count` examples, the same for the same arguments. Labels are the ten places, about equally frequent."""
    split: Split = "train" if part == "train" else "story"
    rng = random.Random(f"demo-task/{part}/{seed}")
    return [_example(rng, split) for _ in range(count)]


def _example(rng: random.Random, split: Split) -> Example:
    narrator = _tell(rng, split)
    story = story_text(narrator.events, rng.choice(("present", "past")), rng)
    person = rng.choice(list(narrator.world.place_of))
    place = narrator.world.place_of[person]
    return Example(
        prompt=f"{story}\nQuestion: Where is {person}?\nAnswer:",
        answer=f" {person} is in the {CODES[place]}.",
        label=place,
    )


def _tell(rng: random.Random, split: Split) -> Narrator:
    """A small story without walks of two people together: those are the ones that the demo model often gets wrong."""
    while True:
        narrator = tell(rng, split, people=rng.randint(2, 3), things=1, deeds=rng.randint(0, 3))
        if not any(event.kind == "move" and len(event.people) > 1 for event in narrator.events):
            return narrator
