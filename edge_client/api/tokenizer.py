"""The model's tokenizer under the names that transformers' tokenizers have. Without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_client.api.batch import Batch
from edge_client.chat_template import ChatTemplate, load_template
from edge_client.tokenizer import EdgeTokenizer


class ApiTokenizer:
    """Text to ids and back. A tokenizer of transformers for the same model gives the same ids."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._edge = EdgeTokenizer.open(folder)
        self.bos_token_id = self._special("bos_token")
        self.eos_token_id = self._special("eos_token")
        self.pad_token_id = self._special("pad_token")

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> dict[str, Tensor]:
        """Give `input_ids` and `attention_mask` `[batch, n]`, padded on the left, as `generate` takes them."""
        texts = [text] if isinstance(text, str) else text
        batch = Batch.read([self.encode(each, add_special_tokens=add_special_tokens) for each in texts])
        return {"input_ids": batch.ids(self._filler), "attention_mask": batch.mask()}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Give the ids of `text`, with BOS where the model wants it."""
        return self._edge.encode(text, special_tokens=add_special_tokens)

    def decode(self, ids: Tensor | Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Give the text of `ids`, special tokens left out unless they are wanted."""
        tokens = ids.tolist() if isinstance(ids, Tensor) else ids
        return self._edge.decode(tokens, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Tensor | Sequence[Sequence[int]], *, skip_special_tokens: bool = True
    ) -> list[str]:
        """Decode row by row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Tensor:
        """Give the ids `[1, n]` of a conversation and the header of the answer; `options` go to the template.

        Raises `UsageError` for a model that cannot chat.
        """
        text = self._template.render(messages, self._edge.special_tokens, tools=tools, options=options)
        return torch.tensor([self.encode(text, add_special_tokens=False)], dtype=torch.int64)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.compile(load_template(self._folder))

    @property
    def _filler(self) -> int:
        return next((token for token in (self.pad_token_id, self.eos_token_id) if token is not None), 0)

    def _special(self, name: str) -> int | None:
        text = self._edge.special_tokens.get(name)
        return None if text is None else self._edge.token_id(text)
