"""The demo's tokenizer: byte-level BPE trained on the corpus. Every word of it is one token, and any text encodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.demo.corpus import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, Document, documents

VOCAB_SIZE = 1024


def train_tokenizer(seed: int, sample: int = 4000) -> Tokenizer:
    """Train on `sample` documents of the training split. At most `VOCAB_SIZE` tokens, special ones first.

    Encoding adds BOS in front; it never adds EOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain_texts(seed, sample), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class DocumentEncoder:
    """Turns documents into token ids with a loss weight for each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, document: Document) -> tuple[list[int], list[float]]:
        """Token ids of the whole document, and for every token the weight of predicting it."""
        ids: list[int] = []
        weights: list[float] = []
        for piece in document:
            tokens = self._tokenizer.encode(piece.text, add_special_tokens=False).ids
            ids += tokens
            weights += [piece.weight] * len(tokens)
        return ids, weights


def _plain_texts(seed: int, sample: int) -> Iterator[str]:
    # Special tokens are cut out: merges must not be learned across them.
    for document in islice(documents(seed), sample):
        text = "".join(piece.text for piece in document)
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "\n")
        yield text
