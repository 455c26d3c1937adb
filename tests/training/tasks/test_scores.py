"""Scores against values worked out by hand, and against the packages of the field."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.errors import UsageError
from training.tasks.examples import Dialogue, Example, Message, Passage, choices
from training.tasks.scores import normalised, perplexity, score, word_f1


def _options(verdicts: str, groups: str) -> list[Example]:
    return [
        Example("p", " Yes" if verdict == "y" else " No", (" No", " Yes"), group=group)
        for verdict, group in zip(verdicts, groups, strict=True)
    ]


def test_multirc_counts_options_and_whole_questions() -> None:
    examples = _options("yynyn", "aabbc")
    said = [" Yes", " No", " No", " Yes", " Yes"]
    # 2 right yes, 1 missed, 1 wrong: F1 = 2 * 2 / (2 * 2 + 1 + 1). Only question b is right as a whole.
    assert score("multirc", examples, said) == pytest.approx({"f1a": 4 / 6, "em": 1 / 3})


def test_multirc_with_every_answer_no() -> None:
    assert score("multirc", _options("yn", "aa"), ["No", "No"]) == {"f1a": 0.0, "em": 0.0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_f1a_is_the_harmonic_mean(pairs: list[tuple[bool, bool]]) -> None:
    examples = _options("".join("y" if truth else "n" for truth, _ in pairs), "a" * len(pairs))
    found = score("multirc", examples, [" Yes" if said else " No" for _, said in pairs])
    hit = sum(truth and said for truth, said in pairs)
    total = sum(truth for truth, _ in pairs) + sum(said for _, said in pairs)
    assert found["f1a"] == pytest.approx(2 * hit / total if total else 0.0)
    assert found["em"] == float(all(truth == said for truth, said in pairs))


@pytest.mark.parametrize("task", ["boolq", "copa", "rte", "wic", "wsc"])
def test_accuracy_is_of_the_whole_answer(task: str) -> None:
    examples = [Example("p", " Yes"), Example("p", " No"), Example("p", " No"), Example("p", " Yes")]
    assert score(task, examples, [" Yes", "No ", " Yes", " yes"]) == {"accuracy": 0.5}


def test_cb_weighs_its_classes_alike() -> None:
    examples = [Example("p", answer) for answer in (" True", " True", " False", " Neither")]
    found = score("cb", examples, [" True", " True", " True", " Neither"])
    # True: precision 2/3, recall 1, F1 4/5; False: 0; Neither: 1.
    assert found == pytest.approx({"accuracy": 0.75, "f1": (4 / 5 + 0 + 1) / 3})


def test_record_takes_the_best_accepted_name() -> None:
    examples = [Example("p", " the White House", accepted=(" Washington",)), Example("p", " Mia Smith")]
    assert score("record", examples, [" Washington", " Mia"]) == pytest.approx({"f1": (1 + 2 / 3) / 2, "em": 0.5})


def test_coqa_leaves_one_human_answer_out_in_turn() -> None:
    example = Example("p", " red", accepted=(" It is red", " Red.", " blue"))
    found = score("coqa", [example], ["red"])
    # Without "red": best is "Red." (1); without "It is red": 1; without "Red.": "red" (1); without "blue": 1.
    assert found == {"f1": 1.0, "em": 1.0}
    found = score("coqa", [example], ["it is"])
    # "it is" against "it is red" is 2*2/5 = 0.8, against all others 0; it is left out once in four.
    assert found == pytest.approx({"f1": 0.8 * 3 / 4, "em": 0.0})


def test_coqa_with_one_human_answer() -> None:
    examples = [Example("p", " a red hat"), Example("p", " yes")]
    assert score("coqa", examples, ["The red hat!", "no"]) == {"f1": 0.5, "em": 0.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The  red, hat.", "red hat"), ("An apple a day", "apple day"), ("theatre", "theatre"), ("U.S.", "us"), ("a", "")],
)
def test_normalisation_follows_the_official_scripts(text: str, expected: str) -> None:
    assert normalised(text) == expected


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_word_f1_is_a_share_and_symmetric(left: str, right: str) -> None:
    assert 0.0 <= word_f1(left, right) <= 1.0
    assert word_f1(left, right) == word_f1(right, left)
    assert word_f1(left, left) == 1.0


def test_rouge_by_hand() -> None:
    found = score("xsum", [Example("p", " the cat sat down")], ["the cat was sitting down"])
    # Stems: the cat sat down / the cat wa sit down. Unigrams shared 3 of 4 and 5, bigrams 1 of 3 and 4, run 3.
    assert found == pytest.approx({"rouge1": 6 / 9, "rouge2": 2 / 7, "rougeL": 6 / 9})


def test_rouge_is_the_mean_over_examples() -> None:
    examples = [Example("p", " one two three"), Example("p", " four five six")]
    assert score("xsum", examples, ["one two three", "x"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


@pytest.mark.parametrize("task", ["pairs", "chat", "demo"])
def test_free_text_is_compared_whole_and_by_words(task: str) -> None:
    dialogue = Dialogue((Message("user", "Where?"), Message("assistant", "Mia is in the hat.")))
    found = score(
        task, [dialogue, Example("p", " Mia is in the hat.")], ["Mia is in the hat.\n", "Mia is in the hall."]
    )
    assert found == pytest.approx({"accuracy": 0.5, "f1": (1 + 3 / 4) / 2})


def test_perplexity() -> None:
    assert perplexity(math.log(7) * 5, 5) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 1))
    with pytest.raises(UsageError, match="at least one target"):
        perplexity(0.0, 0)


def test_only_fixed_answers_are_chosen_from() -> None:
    assert choices(Example("p", " a", (" a", " b"))) == (" a", " b")
    assert choices(Example("p", " a")) == ()
    assert choices(Dialogue((Message("assistant", "a"),))) == ()
    assert choices(Passage("a")) == ()


@pytest.mark.parametrize(
    ("task", "count", "answers", "said"),
    [
        ("text", 1, ["a"], "the answers of 'text' cannot be scored; tasks with scores: multirc"),
        ("boolq", 2, ["a"], "2 examples, 1 answers"),
        ("boolq", 0, [], "no examples to score"),
    ],
)
def test_what_cannot_be_scored_is_refused(task: str, count: int, answers: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        score(task, [Example("p", "a")] * count, answers)
