"""Examples to questions: what fits, what is asked how, and what of a text is attacked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from split_llama.errors import UsageError
from training.evaluate.backend import Progress
from training.evaluate.questions import Questions, Result
from training.evaluate.table import Row, text_table
from training.tasks.encoding import Encoder
from training.tasks.examples import AnyExample, Example, Passage, Sample

LABELLED = [Example("lu ka so?", " banu", choices=(" kan", " banu", " do")), Example("mi?", " do", (" kan", " do"))]


class Oracle:
    """Prefers the choice at `pick`, and says the same to everything else."""

    def __init__(self, pick: int, says: Sequence[int] = ()) -> None:
        self.pick, self.says = pick, list(says)

    async def likelihoods(self, groups: Sequence[Sequence[Sample]], progress: Progress) -> list[list[float]]:
        progress(len(groups))
        return [[-float(abs(at - self.pick)) - 1 for at in range(len(group))] for group in groups]

    async def continuations(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress
    ) -> list[list[int]]:
        assert all(len(prompt) + max_new_tokens <= 256 for prompt in prompts)
        return [self.says for _ in prompts]


@pytest.fixture
def encoder(tiny_checkpoint) -> Encoder:
    return Encoder.open(tiny_checkpoint(), 256)


def asked(encoder: Encoder, examples: Sequence[AnyExample], task: str = "boolq", limit: int | None = None) -> Questions:
    return Questions.of(task, examples, encoder, limit=limit, max_new_tokens=8)


def ask(questions: Questions, model: Oracle) -> Result:
    return asyncio.run(questions.ask(model, lambda done: None))


def test_the_likeliest_choice_is_the_answer(encoder: Encoder) -> None:
    questions = asked(encoder, LABELLED)
    assert ask(questions, Oracle(1)).scores == {"accuracy": 1.0}
    assert ask(questions, Oracle(0)).scores == {"accuracy": 0.0}
    assert ask(questions, Oracle(2)).scores == {"accuracy": 0.5}  # the second has no third choice: its last one


def test_a_free_answer_is_generated(encoder: Encoder) -> None:
    examples = [Example("lu?", " banu do"), Example("ka?", " kan")]
    right = encoder.tokenizer.encode(" kan", special_tokens=False)
    assert ask(asked(encoder, examples, "pairs"), Oracle(0, right)).scores["accuracy"] == 0.5


def test_passages_give_perplexity(encoder: Encoder) -> None:
    questions = asked(encoder, [Passage("banu do kan"), Passage("lu")], "text")
    targets = sum(sample.targets for samples in questions.alternatives for sample in samples)
    assert ask(questions, Oracle(0)).scores == {"perplexity": pytest.approx(math.exp(2 / targets))}


def test_what_does_not_fit_is_left_out_of_every_row(encoder: Encoder) -> None:
    long = Example("lu?", " banu", choices=(" banu", " do" * 300))
    questions = asked(encoder, [LABELLED[0], long, LABELLED[1]])
    assert (len(questions.examples), questions.left_out) == (2, 1)
    with pytest.raises(UsageError, match="--max-length"):
        asked(encoder, [long])
    assert len(asked(encoder, LABELLED, limit=1).examples) == 1


def test_a_prompt_leaves_room_for_its_answer(encoder: Encoder) -> None:
    questions = asked(encoder, [Example("lu ka " * 300, " banu")], "pairs")
    assert len(questions.prompts[0]) == 256 - 8
    assert questions.longest == 256
    ask(questions, Oracle(0))


def test_prompts_are_attacked_but_not_the_choices(encoder: Encoder) -> None:
    questions = asked(encoder, LABELLED)
    texts = questions.texts(5, 100)
    prompts = [encoder.prompt(example, 8) for example in LABELLED]
    assert [list(text) for text in texts] == prompts
    assert [len(text) for text in questions.texts(1, 2)] == [2]
    passage = asked(encoder, [Passage("banu do kan lu mi so")], "text")
    assert passage.texts(1, 100)[0] == passage.alternatives[0][0].token_ids


def test_a_table_is_aligned_and_says_what_is_missing(tmp_path: Path) -> None:
    rows = [
        Row("centralized", Result({"accuracy": 0.5}, 10, 2.0)),
        Row("split", Result({"perplexity": 12.34567}, 10, 20.0), "1,1", "mean-abs=0.02", "fp16"),
    ]
    head, first, second = text_table(rows).splitlines()
    assert head.split() == ["model", "p,q", "noise", "codec", "accuracy", "perplexity", "examples/s"]
    assert first.split() == ["centralized", "-", "-", "-", "50.0%", "-", "5.0"]
    assert second.split() == ["split", "1,1", "mean-abs=0.02", "fp16", "-", "12.3457", "0.5"]
    assert len(head) == len(first) == len(second)


def test_json_has_no_infinity() -> None:
    told = Row("split", Result({"perplexity": math.inf}, 1, 1.0), "1,1", "0", "fp32").to_json()
    assert told["scores"] == {"perplexity": None}
    assert "attack" not in told
