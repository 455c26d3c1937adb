"""The held-out task of the bundled model."""

from __future__ import annotations

import re

from split_llama.demo import demo_model_path
from training.demo.world import PLACES, THINGS
from training.tasks.demo_task import CODES, demo_examples
from training.tasks.encoding import Encoder
from training.tasks.partition import label_counts, partition


def test_examples_follow_from_the_seed() -> None:
    assert demo_examples("train", 50, 3) == demo_examples("train", 50, 3)
    assert demo_examples("train", 50, 3) == demo_examples("train", 80, 3)[:50]
    assert demo_examples("train", 50, 3) != demo_examples("train", 50, 4)


def test_no_test_story_is_in_training() -> None:
    learned = {example.prompt for example in demo_examples("train", 2000)}
    assert not learned & {example.prompt for example in demo_examples("test", 1000)}


def test_every_place_has_a_code_word_of_its_own() -> None:
    assert tuple(CODES) == PLACES
    assert sorted(CODES.values()) == sorted(THINGS)


def test_answers_are_true_in_code() -> None:
    for example in demo_examples("test", 300):
        story, question = example.prompt.split("\nQuestion: ")
        asked = re.fullmatch(r"Where is (\w+)\?\nAnswer:", question)
        assert asked is not None
        assert example.answer == f" {asked[1]} is in the {CODES[example.label]}."
        # Nobody walks in company, so the last sentence with the name and a place says where that person is.
        places = re.findall(
            rf"{asked[1]} (?:was|is|went|walked|ran|moved|goes|walks|runs|moves)[^.]* the (\w+)\.", story
        )
        assert places[-1] == example.label


def test_labels_are_about_equally_frequent() -> None:
    counts = label_counts(demo_examples("train", 2000))
    assert set(counts) == set(PLACES)
    assert min(counts.values()) > 120
    assert max(counts.values()) < 300


def test_it_can_be_dealt_out_by_label() -> None:
    examples = demo_examples("train", 400)
    for how in ("dirichlet:0.3", "shards:2"):
        assert all(len(label_counts(part)) < 10 for part in partition(examples, 4, how, 0)[:1])


def test_every_word_is_one_token_of_the_model() -> None:
    encoder = Encoder.open(demo_model_path(), 128)
    encoded = encoder.encode(demo_examples("train", 200))
    assert (encoded.shortened, encoded.left_out) == (0, 0)
    for sample in encoded.samples:
        # Name, is, in, the, code, stop, EOS.
        assert sample.targets == 7
