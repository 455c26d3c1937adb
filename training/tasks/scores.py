"""Answers to scores, as the data sets' own papers count them. All are shares between 0 and 1, except perplexity.

| task | scores |
|---|---|
| multirc | `f1a`: F1 over all answer options; `em`: share of questions with every option right |
| boolq, copa, rte, wic, wsc | `accuracy` |
| cb | `accuracy`, and `f1`: the mean of the three classes' F1 |
| record | `f1`, `em`: the best over the accepted names |
| coqa | `f1`, `em`: as CoQA's official script, which leaves one human answer out in turn |
| xsum | `rouge1`, `rouge2`, `rougeL`: F-measures with stemming |
| pairs, chat, demo | `accuracy`: the whole answer, apart from white space around it; `f1`: of its words |
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType

from split_llama.errors import UsageError
from training.tasks.examples import Dialogue, Example

Answered = Example | Dialogue
ROUGE = ("rouge1", "rouge2", "rougeL")


def score(task: str, examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    """The scores of `answers`, one for each example, in the order of the table above.

    An answer is one of the example's choices or generated text, as `training.tasks.examples.choices` says. Raises
    `UsageError` for tasks without answers and for counts that differ.
    """
    if task not in _SCORES:
        raise UsageError(f"the answers of {task!r} cannot be scored; tasks with scores: {', '.join(_SCORES)}")
    if len(examples) != len(answers):
        raise UsageError(f"one answer for each example is expected: {len(examples)} examples, {len(answers)} answers")
    if not examples:
        raise UsageError("there are no examples to score")
    return _SCORES[task](examples, [answer.strip() for answer in answers])


def perplexity(loss_sum: float, targets: int) -> float:
    """e to the mean loss, from the sum of `targets` tokens' losses in nats; infinite where that overflows."""
    if targets < 1:
        raise UsageError("perplexity needs at least one target token")
    try:
        return math.exp(loss_sum / targets)
    except OverflowError:
        return math.inf


def _accuracy(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    return {"accuracy": fmean(example.answer.strip() == said for example, said in zip(examples, answers, strict=True))}


def _free_text(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    pairs = zip(examples, answers, strict=True)
    return _accuracy(examples, answers) | {"f1": fmean(word_f1(example.answer, said) for example, said in pairs)}


def _cb(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    right = [example.answer.strip() for example in examples]
    f1 = f1_score(right, list(answers), average="macro", zero_division=0)
    return _accuracy(examples, answers) | {"f1": float(f1)}


def _multirc(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    """Khashabi et al. 2018: F1 over all options; and a question counts only with all of its options right."""
    from sklearn.metrics import f1_score

    right = [example.answer.strip() == "Yes" for example in examples]
    said = [answer == "Yes" for answer in answers]
    whole: dict[str, bool] = defaultdict(lambda: True)
    for example, truth, verdict in zip(examples, right, said, strict=True):
        group = example.group if isinstance(example, Example) else ""
        whole[group] = whole[group] and truth == verdict
    return {"f1a": float(f1_score(right, said, zero_division=0)), "em": fmean(whole.values())}


def _record(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(map(_accepted, examples), answers, strict=True))
    return {
        "f1": fmean(max(word_f1(gold, said) for gold in golds) for golds, said in pairs),
        "em": fmean(max(_exact(gold, said) for gold in golds) for golds, said in pairs),
    }


def _coqa(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(map(_accepted, examples), answers, strict=True))
    return {
        "f1": fmean(_leaving_one_out(word_f1, golds, said) for golds, said in pairs),
        "em": fmean(_leaving_one_out(_exact, golds, said) for golds, said in pairs),
    }


def _leaving_one_out(measure: Callable[[str, str], float], golds: Sequence[str], said: str) -> float:
    """The mean, over the human answers, of the best against the others: so people and models are measured alike."""
    if len(golds) == 1:
        return measure(golds[0], said)
    values = [measure(gold, said) for gold in golds]
    return fmean(max(values[:left_out] + values[left_out + 1 :]) for left_out in range(len(values)))


def _xsum(examples: Sequence[Answered], answers: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scored = [scorer.score(example.answer.strip(), said) for example, said in zip(examples, answers, strict=True)]
    return {name: fmean(one[name].fmeasure for one in scored) for name in ROUGE}


def _accepted(example: Answered) -> list[str]:
    return [example.answer, *(example.accepted if isinstance(example, Example) else ())]


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and repeated white space.

    The normalisation of SQuAD's and CoQA's official evaluation scripts (Rajpurkar et al. 2016, Reddy et al. 2019).
    """
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(gold: str, said: str) -> float:
    """F1 over the bags of normalised words; two empty texts are equal."""
    left, right = normalised(gold).split(), normalised(said).split()
    if not left or not right:
        return float(left == right)
    shared = (Counter(left) & Counter(right)).total()
    return 2 * shared / (len(left) + len(right))


def _exact(gold: str, said: str) -> float:
    return float(normalised(gold) == normalised(said))


_SCORES: Mapping[str, Callable[[Sequence[Answered], Sequence[str]], dict[str, float]]] = MappingProxyType(
    {
        "multirc": _multirc,
        "boolq": _accuracy,
        "cb": _cb,
        "copa": _accuracy,
        "record": _record,
        "rte": _accuracy,
        "wic": _accuracy,
        "wsc": _accuracy,
        "coqa": _coqa,
        "xsum": _xsum,
        "pairs": _free_text,
        "chat": _free_text,
        "demo": _free_text,
    }
)
