"""What callers may send, as OpenAI's API has it, with vLLM's extras.

Unknown fields are ignored. Fields that are known and would change the answer, but are not served, are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from edge_client.gateway.errors import ApiError, unsupported

MAX_ALTERNATIVES = 20
MAX_STOPS = 16
MAX_PROMPTS = 2048
# Those of 2**31, more than any vocabulary; Python itself refuses to read thousands.
MAX_ID_DIGITS = 10

# Field -> the values under which it asks for nothing, and what to do instead.
_BOTH: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_beam_search": ((False,), "answers are sampled"),
    "min_tokens": ((0,), "use ignore_eos with max_tokens for an answer of fixed length"),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": (([],), "use logit_bias"),
    "logits_processors": (([],), "use logit_bias"),
    "prompt_logprobs": ((), "use /v1/completions with echo and logprobs"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "include_stop_str_in_output": ((False,), "the text ends before a stop string"),
    "truncate_prompt_tokens": ((-1,), "a prompt is never cut: send less"),
    "guided_json": ((), "use response_format with json_schema"),
    "guided_regex": ((), "use response_format with json_schema and a pattern"),
    "guided_choice": ((), "use response_format with json_schema and an enum"),
    "guided_grammar": ((), "use response_format with json_schema"),
    "structured_outputs": ((), "use response_format with json_schema"),
}
_CHAT: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "the edge makes its own guesses (--speculate)"),
    "web_search_options": ((), "nothing here reaches the web"),
    "functions": (([],), "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "chat_template": ((), "the model's own template is used"),
    "add_generation_prompt": ((True,), "the answer is always a new message"),
    "continue_final_message": ((False,), "use /v1/completions to continue a text"),
    "echo": ((False,), "use /v1/completions"),
    "documents": (([],), "put them into a message"),
    "best_of": ((1,), "use n"),
}
_COMPLETION: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "the model continues a prompt, it does not fill gaps"),
    "best_of": ((1,), "use n"),
    "prompt_embeds": ((), "embeddings never leave the edge, and none come in"),
}


class ApiModel(BaseModel):
    """What an API object has in common: unknown fields are kept apart, to tell apart what is unknown and unserved."""

    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(ApiModel):
    """What a stream has besides its text."""

    include_usage: bool = False


class AnyRequest(ApiModel):
    """The fields that both routes share. None is as good as absent."""

    model: StrictStr | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[StrictStr, Field(min_length=1)] | list[Annotated[StrictStr, Field(min_length=1)]] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: StrictInt | None = None
    min_p: float | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[StrictInt, Field(ge=0)]] | None = None

    def stops(self) -> tuple[str, ...]:
        """Give the stop strings."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise ApiError(f"stop has {len(stops)} texts, at most {MAX_STOPS} are possible", param="stop")
        return stops

    def sampling(self) -> dict[str, Any]:
        """Give what `SamplingParams.resolve` takes, as far as the caller named it."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        # vLLM's word for "off" is -1, transformers' 0.
        values["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        values["logit_bias"] = self._bias()
        return values

    def include_usage(self) -> bool:
        """Say whether a stream ends with its usage."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is only possible with stream", param="stream_options")
        return self.stream_options is not None and self.stream_options.include_usage

    def _bias(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        if not all(_is_id(token) for token in self.logit_bias):
            raise ApiError("logit_bias must name tokens by their ids", param="logit_bias")
        return {int(token): bias for token, bias in self.logit_bias.items()}


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MAX_ID_DIGITS


class CompletionRequest(AnyRequest):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    echo: bool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Raise `ApiError` for what is not served."""
        _refuse(self.model_extra, {**_BOTH, **_COMPLETION})
        if (self.model_extra or {}).get("response_format") not in (None, {"type": "text"}):
            raise unsupported("response_format", "use /v1/chat/completions")

    def prompts(self) -> list[str] | list[list[int]]:
        """Give the prompts, all as text or all as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or len(prompt) > MAX_PROMPTS:
            raise ApiError(f"prompt has {len(prompt)} entries; from 1 to {MAX_PROMPTS} are possible", param="prompt")
        # The union of the annotation allows four shapes, and no mixture of them.
        return [prompt] if isinstance(prompt[0], int) else prompt


class TextPart(ApiModel):
    """A part of a message. Only texts are served; others are refused with the name of their type."""

    type: StrictStr
    text: StrictStr | None = None


class CalledFunction(ApiModel):
    """The function of a call: its arguments are JSON as text."""

    name: StrictStr
    arguments: StrictStr = "{}"


class ToolCall(ApiModel):
    """A call that an earlier answer made."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(ApiModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None


class JsonSchema(ApiModel):
    """A named schema."""

    name: StrictStr | None = None
    # `schema` would hide a method of pydantic's.
    content: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(ApiModel):
    """What the answer's text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FunctionSpec(ApiModel):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None


class Tool(ApiModel):
    """A tool: only functions are served."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(ApiModel):
    """The name inside a `tool_choice`."""

    name: StrictStr


class NamedTool(ApiModel):
    """A `tool_choice` of one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(AnyRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise `ApiError` for what is not served, and for fields that do not go together."""
        _refuse(self.model_extra, {**_BOTH, **_CHAT})
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens == 0:
            raise ApiError("max_tokens must be at least 1", param="max_tokens")
        if self.tool_choice is not None and self.tool_choice != "none" and not self.tools:
            raise ApiError("tool_choice needs tools", param="tool_choice")

    def alternatives(self) -> int | None:
        """Give how many alternatives each token is to have, None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _refuse(extra: Mapping[str, Any] | None, known: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    for name, value in (extra or {}).items():
        if name in known and value is not None and value not in known[name][0]:
            raise unsupported(name, known[name][1])
