"""Chat templates against transformers' `apply_chat_template`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from edge_client.chat_template import ChatTemplate, load_template, render
from edge_client.tokenizer import EdgeTokenizer
from split_llama.demo import demo_model_path
from split_llama.errors import UsageError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS = [
    [{"role": "user", "content": "Where is Tom? "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Où est <s>Tom</s>? 🙂"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who has the ball?"},
    ],
]
TEMPLATES = [
    "{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m.content }}\n    {% endif %}\n{% endfor %}\nA:",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "{{ strftime_now('%Y') }}{% if tools %}tools{% endif %}{% if add_generation_prompt %}go{% endif %}",
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", ["llama2-tokenizer", "demo"])
def test_model_templates_equal_transformers(name: str, messages: list[dict[str, str]], data_dir: Path) -> None:
    folder = demo_model_path() if name == "demo" else data_dir / name
    ours, theirs = EdgeTokenizer.open(folder), AutoTokenizer.from_pretrained(str(folder))
    text = render(load_template(folder), messages, ours.special_tokens)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode(text, special_tokens=False) == ids


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_language_equals_transformers(template: str, messages: list[dict[str, str]], data_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(data_dir / "stories260K"))
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert render(template, messages, SPECIAL) == expected


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place: höchst <b>genau</b>",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
TOOL_TALK = [
    {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Graz?"}]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Graz 🙂"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]
TOOL_TEMPLATE = """
{%- if tools %}
    {{- "<tools>" }}{% for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}{{ "\\n</tools>\\n" }}
{%- endif %}
{%- for m in messages %}
    {{- "<" + m.role + ">" }}
    {%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- "<tool_call>" }}{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
    {%- endfor %}
    {%- if m.tool_call_id is defined %}{{ "#" + m.tool_call_id }}{% endif %}
{%- endfor %}
{{- "" if tools is none else tools | length }}{{ documents is none }}
"""


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_tools_calls_and_parts_equal_transformers(tools: list[dict[str, Any]] | None, data_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(data_dir / "stories260K"))
    expected = theirs.apply_chat_template(
        TOOL_TALK, tools=tools, chat_template=TOOL_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert "Graz 🙂" in expected
    assert render(TOOL_TEMPLATE, TOOL_TALK, SPECIAL, tools=tools) == expected


def test_options_reach_the_template_but_replace_nothing() -> None:
    template = ChatTemplate.compile("{{ thinking }}{{ bos_token }}{{ messages | length }}")
    options = {"thinking": False, "bos_token": "mine", "messages": []}
    assert template.render(CONVERSATIONS[0], SPECIAL, options=options) == "False<s>1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("{{ nothing.there }}", "refuses these messages"),
    ],
)
def test_faults_of_a_template_are_the_users_to_see(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(template, CONVERSATIONS[0], SPECIAL)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        load_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_template(tmp_path) == "one"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "two"}]}))
    assert load_template(tmp_path) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert load_template(tmp_path) == "three"
