"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

from pydantic import Field, StrictInt, StrictStr

from edge_client.gateway.errors import ApiError
from edge_client.gateway.messages import to_template
from edge_client.gateway.requests import ApiModel, ChatMessage, Tool
from edge_client.gateway.service import AnswerService
from edge_client.tokenizer import SPECIAL_TOKENS
from split_llama.errors import UsageError


class TokenizeRequest(ApiModel):
    """A prompt, or the messages of a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(ApiModel):
    """Token ids."""

    model: StrictStr | None = None
    tokens: list[Annotated[StrictInt, Field(ge=0, lt=2**31)]]


def tokenize(service: AnswerService, body: TokenizeRequest) -> dict[str, Any]:
    """Give the ids of a text. Blocking. Raises `UsageError`."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()] or None
        ids = service.chat_ids(to_template(body.messages), tools=tools, options=body.chat_template_kwargs)
    else:
        ids = service.edge.tokenizer.encode(body.prompt or "", special_tokens=body.add_special_tokens is not False)
    names = [service.vocabulary.text_of(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.edge.max_length, "tokens": ids, "token_strs": names}


def describe_tokenizer(service: AnswerService) -> dict[str, Any]:
    """Say what lm-eval asks about a tokenizer that it does not have. Blocking."""
    template = None
    with contextlib.suppress(UsageError):
        template = service.prompts.template.source
    special = dict.fromkeys(SPECIAL_TOKENS) | service.edge.tokenizer.special_tokens
    return {**special, "chat_template": template, "model_max_length": service.edge.max_length}


def detokenize(service: AnswerService, body: DetokenizeRequest) -> dict[str, Any]:
    """Give the text of ids, without special tokens. Blocking."""
    return {"prompt": service.edge.tokenizer.decode(body.tokens)}
