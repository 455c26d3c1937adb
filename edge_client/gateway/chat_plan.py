"""What a chat request comes to: the prompt's ids, how each choice is made, and how its text is read. Blocking parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_client.constraint import Constraint
from edge_client.gateway.errors import ApiError
from edge_client.gateway.grammar import ANY_OBJECT, Trigger, TriggeredConstraint
from edge_client.gateway.messages import to_template
from edge_client.gateway.requests import ChatRequest, NamedTool, Tool
from edge_client.gateway.runs import Job, make_params
from edge_client.gateway.service import AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.gateway.tool_calls import CallReader, Choice, ToolFormat, grammar, grammar_behind_trigger

Schema = dict[str, Any]
MakeConstraint = Callable[[], Constraint]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request: which may be called, how they are written, and what their arguments are."""

    form: ToolFormat
    choice: Choice
    schemas: dict[str, Schema]

    def reader(self) -> CallReader:
        """Start reading an answer."""
        return CallReader(self.form, self.choice.names)


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A request, ready to be run."""

    job: Job
    tools: ToolUse | None


def plan_chat(service: AnswerService, gateway: GatewaySettings, body: ChatRequest) -> ChatPlan:
    """Render, tokenise and compile. Blocking. Raises `ApiError`, `UsageError`."""
    messages = to_template(body.messages)
    used = _tool_use(service, body)
    # The tools as they came: a template may show fields that nothing here knows.
    shown = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()] if used is not None else None
    ids = service.chat_ids(messages, tools=shown, options=body.chat_template_kwargs)
    constraint = _constraint(service, used, _answer_schema(body))
    # Where nothing is said the answer ends with the context.
    limit = body.max_completion_tokens or body.max_tokens or service.edge.max_length
    params = make_params(service, gateway, body, limit, logprobs=body.alternatives(), constraint=constraint)
    service.edge.turn(ids, params[0])
    return ChatPlan(Job(ids, params), used)


def _tool_use(service: AnswerService, body: ChatRequest) -> ToolUse | None:
    wanted = body.tool_choice or "auto"
    if not body.tools or wanted == "none":
        return None
    schemas = {tool.function.name: _schema(tool, f"tools.{place}") for place, tool in enumerate(body.tools)}
    if len(schemas) < len(body.tools):
        raise ApiError("two tools have the same name", param="tools")
    names = tuple(schemas)
    parallel = body.parallel_tool_calls is not False
    if isinstance(wanted, NamedTool):
        if wanted.function.name not in schemas:
            raise ApiError(f"tool_choice names {wanted.function.name!r}, which is no tool here", param="tool_choice")
        names, parallel = (wanted.function.name,), False
    choice = Choice(names, must=wanted != "auto", parallel=parallel)
    return ToolUse(service.prompts.tool_format, choice, schemas)


def _schema(tool: Tool, place: str) -> Schema:
    schema = tool.function.parameters
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        param = f"{place}.function.parameters"
        raise ApiError(f"{param}: arguments are an object, not {schema['type']!r}", param=param)
    return schema | {"type": "object"}


def _answer_schema(body: ChatRequest) -> Schema | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None or wanted.json_schema.content is None:
        raise ApiError("response_format of type json_schema needs json_schema.schema", param="response_format")
    return wanted.json_schema.content


def _constraint(service: AnswerService, used: ToolUse | None, answer: Schema | None) -> MakeConstraint | None:
    grammars, vocabulary = service.grammars, service.vocabulary
    if used is None:
        return None if answer is None else grammars.json(answer, "response_format")
    if answer is not None and not used.form.many and not used.choice.must:
        raise ApiError(
            "response_format together with tools is not possible with this model, whose tool calls are JSON too; "
            "give one of them",
            param="response_format",
        )
    tokens, form = vocabulary.added, used.form
    try:
        if used.choice.must or answer is not None:
            return grammars.lark(grammar(form, used.schemas, used.choice, answer, tokens), "tools")
        make = grammars.lark(grammar_behind_trigger(form, used.schemas, used.choice, tokens), "tools")
    except ApiError:
        # Together they tell nothing about which one it was.
        if answer is not None:
            grammars.json(answer, "response_format")
        for place, name in enumerate(used.schemas):
            grammars.json(used.schemas[name], f"tools.{place}.function.parameters")
        raise
    trigger = Trigger(form.trigger.encode(), many=form.many, again=form.many and used.choice.parallel)
    return lambda: TriggeredConstraint(trigger, make, vocabulary.bytes_of)
