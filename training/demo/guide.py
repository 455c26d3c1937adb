"""Extra losses that show the model how to look facts up. Nothing of them is left in the trained model.

To answer where Mia is, a model must (1) know at the word ``kitchen`` that the sentence is about Mia, and (2) look from
its answer ``Mia is in the ...`` at the latest such word. From answers alone a model of this size needs thousands of
steps to find the two parts, because neither helps without the other; a loss for each needs about a hundred. For yes/no
questions the same look-up happens at the claim in the question, and the trainer asks for the fact and then for the
verdict right there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from training.demo.batches import Batch
from training.demo.corpus import BOS, END, EOS
from training.demo.world import NAMES, PLACES, THINGS

# The number of blocks after which a subject, a fact and a verdict are to be known.
SUBJECT_STATES = 2
FACT_STATES = 3
VERDICT_STATES = 5
_LOOKUP_BLOCK = 2
_HEADS = 2
# In tokens after Yes or No: the longest way to the first fact, and the words of ", Mia has the key in the park".
_FACT_REACH = 8
_HOLDER_OFFSET = 2
_PLACE_OFFSET = 8


@dataclass(frozen=True)
class Verdicts:
    """The N yes/no answers of a batch; every field int64 [N].

    `words` are the positions of Yes and No, `asked` of the last word of the claim in the question, `ids` the tokens.
    """

    rows: Tensor
    words: Tensor
    asked: Tensor
    ids: Tensor


class Guide(nn.Module):
    """Finds the subject of every word and the fact behind every answer, and scores how well the model sees both.

    Both are functions of the token ids. Legend: R rows, T positions.
    """

    classes: Tensor
    stops: Tensor
    facts: Tensor
    yes_no: Tensor
    places: Tensor

    def __init__(self, tokenizer: Tokenizer, hidden: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, len(NAMES) + len(THINGS), bias=False)
        classes = torch.full((tokenizer.get_vocab_size(),), -1)
        for index, word in enumerate(NAMES + THINGS):
            classes[_ids(tokenizer, [word, " " + word])] = index
        self.register_buffer("classes", classes)
        self.register_buffer("stops", _marked(tokenizer, [".", "?", END, EOS, BOS]))
        self.register_buffer("facts", _marked(tokenizer, [" " + word for word in PLACES + THINGS]))
        self.register_buffer("places", _marked(tokenizer, [" " + word for word in PLACES]), persistent=False)
        self.register_buffer("yes_no", _marked(tokenizer, ["Yes", " Yes", "No", " No"]))
        (self.question,) = _ids(tokenizer, ["?"])

    def subjects(self, ids: Tensor) -> Tensor:
        """Class of the nearest name or thing before each token in its sentence, -1 for none; int64 [R, T]."""
        latest = _latest(self.classes[ids] >= 0)[:, :-1]
        # A stop in the word's own place counts: it belongs to no sentence.
        stop = _latest(self.stops[ids])[:, 1:]
        found = self.classes[ids].gather(1, latest.clamp(min=0)).masked_fill(latest <= stop, -1)
        return pad(found, (1, 0), value=-1)

    def fact_codes(self, ids: Tensor) -> Tensor:
        """A number for each fact, a subject with a place or a thing, at the word that completes it; else -1; [R, T]."""
        subject = self.subjects(ids)
        return torch.where((subject >= 0) & self.facts[ids], subject * len(self.stops) + ids, -1)

    def in_question(self, ids: Tensor) -> Tensor:
        """Whether each token's sentence is a question; bool [R, T]."""
        length = ids.shape[1]
        places = torch.arange(length, device=ids.device).expand_as(ids)
        ends = torch.where(self.stops[ids], places, length - 1).flip(1).cummin(1).values.flip(1)
        return ids.gather(1, ends).eq(self.question)

    def sources(self, batch: Batch) -> Tensor:
        """For each position whose next word states a fact in an answer: where the text last stated it; else -1.

        int64 [R, T - 1]. Questions state nothing.
        """
        code = self.fact_codes(batch.ids)
        stated = (code >= 0) & ~self.in_question(batch.ids)
        same = (code[:, 1:, None] == code[:, None, :-1]) & stated[:, None, :-1]
        same = same.tril() & ((code >= 0) & (batch.weights == 1.0))[:, 1:, None]
        places = torch.arange(code.shape[1], device=code.device)
        return torch.where(same, places[:-1], -1).amax(-1)

    def verdicts(self, batch: Batch) -> Verdicts:
        """The yes/no answers of a batch and the questions before them."""
        ids, code = batch.ids, self.fact_codes(batch.ids)
        rows, words = torch.nonzero(self.yes_no[ids] & (batch.weights > 1.0), as_tuple=True)
        asked = _latest((code >= 0) & self.in_question(ids))[rows, words]
        return Verdicts(rows, words, asked, ids[rows, words])

    def first_facts(self, batch: Batch, verdicts: Verdicts, source: Tensor) -> Tensor:
        """Where the text last stated the first fact of each yes/no answer, else -1; `source` comes from `sources`."""
        positions = torch.arange(source.shape[1], device=source.device)
        after = (source[verdicts.rows] >= 0) & (positions >= verdicts.words[:, None])
        first = torch.where(after, positions, source.shape[1] - 1).amin(1)
        # A fact further away than a verdict's sentence is long belongs to another answer.
        near = after.any(1) & (first - verdicts.words <= _FACT_REACH)
        return source[verdicts.rows, first].masked_fill(~near, -1)

    def holder_places(self, batch: Batch, verdicts: Verdicts) -> Tensor:
        """For answers like ``No, Mia has the key in the park``: where the text last stated Mia's place; else -1."""
        ids, length = batch.ids, batch.ids.shape[1]
        holder = self.classes[ids[verdicts.rows, (verdicts.words + _HOLDER_OFFSET).clamp(max=length - 1)]]
        place = ids[verdicts.rows, (verdicts.words + _PLACE_OFFSET).clamp(max=length - 1)]
        wanted = torch.where((holder >= 0) & (holder < len(NAMES)), holder * len(self.stops) + place, -2)
        positions = torch.arange(length, device=ids.device)
        code = self.fact_codes(ids).masked_fill(self.in_question(ids), -1)[verdicts.rows]
        found = (code == wanted[:, None]) & (positions < verdicts.asked[:, None])
        carried = self.places[ids[verdicts.rows, verdicts.asked]] & self.places[place]
        return torch.where(found & carried[:, None], positions, -1).amax(1)

    def subject_loss(self, states: Tensor, ids: Tensor) -> Tensor:
        """Cross entropy of the subjects as read from `states` [R, T, hidden], the output of the second block."""
        scale = states.float().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        logits = self.head(states * scale).flatten(0, 1).float()
        return cross_entropy(logits, self.subjects(ids).flatten(), ignore_index=-1)

    def lookup_loss(self, attentions: Sequence[Tensor], batch: Batch) -> Tensor:
        """Minus the log of the attention paid to the sources; `attentions` [R, heads, T, T] of each block.

        In one block two heads look from answers and two others from yes/no questions, whose claim must be compared
        with the fact. In the next block two heads look from a carried thing's holder to the holder's place.
        """
        source, verdicts = self.sources(batch), self.verdicts(batch)
        rows, queries = torch.nonzero(source >= 0, as_tuple=True)
        answers = attentions[_LOOKUP_BLOCK][rows, :_HEADS, queries, source[rows, queries]]
        first, second = self.first_facts(batch, verdicts, source), self.holder_places(batch, verdicts)
        rows, asked = verdicts.rows, verdicts.asked
        questions = attentions[_LOOKUP_BLOCK][rows, _HEADS : 2 * _HEADS, asked, first][first >= 0]
        carried = attentions[_LOOKUP_BLOCK + 1][rows, :_HEADS, asked, second][second >= 0]
        parts = [-(part.float() + 1e-6).log().mean() for part in (answers, questions, carried) if part.numel()]
        return torch.stack(parts).sum() if parts else attentions[0].sum() * 0.0


def _latest(marked: Tensor) -> Tensor:
    """For each position the last marked one up to it, -1 for none; `marked` bool [R, T]."""
    places = torch.arange(marked.shape[1], device=marked.device)
    return torch.where(marked, places, -1).cummax(1).values


def _ids(tokenizer: Tokenizer, words: list[str]) -> list[int]:
    encoded = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    return [ids[0] for ids in encoded if len(ids) == 1]


def _marked(tokenizer: Tokenizer, words: list[str]) -> Tensor:
    marked = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
    marked[_ids(tokenizer, words)] = True
    return marked
