"""How the fields of each data set become a prompt, all in one place.

arXiv 2505.15683 (FL-LLaMA) names its tasks but not its prompts, so these are plain ones in the manner of the field
(the text first, then labelled lines, `Answer:` last), not the paper's own. Answers begin with the space that follows
the label. A template is filled by `str.format`, so what a data file holds is never read as a template.
"""

from __future__ import annotations

TEMPLATES = {
    "boolq": "{passage}\nQuestion: {question}?\nAnswer:",
    "cb": "{premise}\nStatement: {hypothesis}\nQuestion: Is the statement true, false, or neither?\nAnswer:",
    "copa-cause": "{premise}\nQuestion: What was the cause?\nAnswer:",
    "copa-effect": "{premise}\nQuestion: What happened as a result?\nAnswer:",
    "multirc": "{paragraph}\nQuestion: {question}\nProposed answer: {answer}\nIs the proposed answer right?\nAnswer:",
    "record": "{passage}\nStatement: {query}\nQuestion: Which name is missing at the blank?\nAnswer:",
    "rte": "{premise}\nQuestion: Does it follow that {hypothesis}?\nAnswer:",
    "wic": (
        "{sentence1}\n{sentence2}\nQuestion: Does the word {word} have the same meaning in both sentences?\nAnswer:"
    ),
    "wsc": "{text}\nQuestion: In this text, does {pronoun} stand for {name}?\nAnswer:",
    "xsum": "{document}\nSummary:",
    "coqa": "{story}\n{turns}Question: {question}\nAnswer:",
    "coqa-turn": "Question: {question}\nAnswer: {answer}\n",
}

NO_YES = (" No", " Yes")
# In the order of the labels' numbers in the Hugging Face copies of the data.
CB_ANSWERS = {"entailment": " True", "contradiction": " False", "neutral": " Neither"}
RTE_ANSWERS = {"entailment": " Yes", "not_entailment": " No"}
BLANK = "____"  # what stands in ReCoRD's statement for @placeholder


def fill(template: str, /, **fields: str) -> str:
    """The prompt `template` with these fields; white space around a field is dropped."""
    kept = fields if template.startswith("coqa") else {key: value.strip() for key, value in fields.items()}
    return TEMPLATES[template].format(**kept)
