# ruff: noqa: E501 (templates are long lines)
"""Chat templates: those of real models render as transformers renders them; hostile ones end soon, and small."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ifprune_mlx import chat_sandbox
from ifprune_mlx.chat_sandbox import ChatTemplate, TemplateLimitError
from tests.tiny import TEMPLATE

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be short.\n"},
    {"role": "user", "content": "Weather in Paris & <Rome>?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "think",
        "tool_calls": [
            {"type": "function", "id": "a", "function": {"name": "w", "arguments": {"city": "Paris", "n": 1}}}
        ],
    },
    {"role": "tool", "content": '{"t": 21.5}', "name": "w", "tool_call_id": "a"},
    {"role": "user", "content": "And in \u6771\u4eac?"},
]
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}]
# What the templates of Llama 3, Qwen, Mistral, Gemma and Command-R are made of.
SOUND = [
    TEMPLATE,
    "{{- bos_token }}{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}"
    "{%- for m in messages %}{%- if not (m.role == 'tool' or 'tool_calls' in m) %}"
    "{{- '<|h|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot|>' }}{%- elif 'tool_calls' in m %}"
    "{%- if not m.tool_calls|length == 1 %}{{- raise_exception('one call') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}{{- '{\"name\": \"' + call.name + '\", ' }}"
    "{%- for k, v in call.arguments | items %}{{- k ~ '=' ~ v }}{%- if not loop.last %}, {%- endif %}{%- endfor %}"
    "{%- else %}{{- m.content | tojson }}{%- endif %}{%- endfor %}",
    "{%- macro show(x, deep=false) %}{{ x['role']|upper }}{% if deep %}!{% endif %}{% endmacro %}"
    "{%- set ns = namespace(last=-1, seen=[]) %}{%- for m in messages[::-1] %}{%- if m.role == 'user' and ns.last < 0 %}"
    "{%- set ns.last = (messages|length - 1) - loop.index0 %}{%- endif %}{%- endfor %}"
    "{{ ns.last }}{{ show(messages[0], deep=true) }}{{ messages | map(attribute='role') | join(', ') }}"
    "{%- for m in messages if m.role != 'tool' %}{{ loop.index }}/{{ loop.length }}{{ loop.previtem.role if loop.previtem }}"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content.strip('\\n').split('x')[-1] }}</think>{%- endif %}{%- endfor %}",
    "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% if m['role'] == 'tool' %}{% continue %}{% endif %}"
    "{% generation %}{{ '%s: %s' % (m.role, m.content) }}{% endgeneration %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% endfor %}{{ [1, 2, 3][1] }}{{ {'a': (1, 2)}.a[0] }}{% set a, b = 1, 'x' %}{{ a ~ b }}{{ enable_thinking }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('content') | list }}"
    "{{ (tools or [])|map(attribute='function')|map(attribute='name')|sort|join }}{{ range(3)|list }}"
    "{{ 'a-b'.replace('-', '_').title() }}{{ 'x'.join(['1', '2']) }}{{ '{}'.format(3) }}{{ 'z'|default('q')|indent(2) }}",
    # Stars, years and braces around placeholders are no widths.
    "{{ '**%s** since 20240101, 100%%' % messages[1].role }}{{ '* %-5s|%(x)' | replace('%(x)', '') | format('a') }}"
    "{{ 'Cutoff 20231001: {} {0!r:>4}'.replace('{0!r', '{:') | length }}{{ '20240101 {:>4} * {x}'.format('a', x=3) }}"
    "{{ '{\"name\": {\"a\": \"%s\"}, \"year\": 20240101}' % 'w' }}{{ '%(n)s *20240101*' % {'n': 'b'} }}",
    # Command-R's and Granite's ask for documents.
    "{% if documents is not none %}documents{% endif %}{{ documents is defined }}",
]


@pytest.mark.parametrize("source", SOUND)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_sound_templates_render_as_transformers_renders_them(source: str, tools: list[Any] | None) -> None:
    variables = {"add_generation_prompt": True, "enable_thinking": True, "bos_token": "<s>"}
    plain = [{name: value for name, value in message.items() if value is not None} for message in MESSAGES]
    (expected,), _ = render_jinja_template([plain], tools=tools, chat_template=source, **variables)
    del variables["bos_token"]
    assert ChatTemplate(source, None, {"bos_token": "<s>"})(MESSAGES, tools=tools, **variables) == expected


HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in range(99999) %}{% if i in range(99999)|list %}{% endif %}{% endfor %}",
    "{{ 'a' * 3000000000 }}", "{{ 3000000000 * 'a' }}", "{{ [0] * 3000000000 }}", "{{ ('a', 'b') * 3000000000 }}",
    "{{ '%3000000000d' % 1 }}", "{{ '%*d' % (3000000000, 1) }}", "{{ '%(a(b)c)3000000000d' % {'a(b)c': 1} }}",
    "{{ '%(a)3000000000d' % {'a': 1} }}", "{{ '%%%- 3000000000d' % 1 }}", "{{ '%.*f' % (3000000000, 1.5) }}",
    "{{ '{a[0]!s:>3000000000}'.format(a=[1]) }}", "{{ '{{{:3000000000}'.format(1) }}", "{{ '{:3000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 3000000000) }}", "{{ '%3000000000d'|format(1) }}", "{{ '%.3000000000f'|format(1.5) }}",
    "{{ 'a'|center(3000000000) }}", "{{ 'a'.ljust(3000000000) }}", "{{ 'a'.zfill(3000000000) }}",
    "{{ 'a'|indent(3000000000, true) }}", "{{ [1]|batch(3000000000, 'x')|list }}", "{{ [1]|slice(3000000000)|list }}",
    "{{ [[1]]|tojson(indent=3000000000) }}", "{{ 5|round(3000000000, 'ceil') }}", "{{ (5).to_bytes(3000000000, 'big') }}",
    "{{ 9 ** (9 ** 9) }}", "{{ ('\\t' * 900000).expandtabs(900) }}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x|tojson }}",
    "{% set n = namespace(x=2 ** 5000) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "{{ range(99999)|join('x' * 900000) }}", "{{ ('x' * 900000).join(range(9999)|map('string')|list) }}",
    "{{ '%s' * 99999 % (('x' * 900000,) * 99999) }}", "{{ ('{0}' * 99999).format('x' * 900000) }}",
    "{{ ([[1]] * 99999)|sum(start=[]) }}", "{% for i in range(99999) %}{{ 'x' * 900000 }}{% endfor %}",
    "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}{% for i in range(9999) %}{% call f() %}{{ 'x' * 900000 }}"
    "{% endcall %}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end_soon_and_small(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "_SECONDS", 1.0)
    template, start = ChatTemplate(source, None, {}), time.monotonic()
    with pytest.raises(TemplateLimitError):
        template(MESSAGES)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum(1000000) }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 'x'|attr('__class__')() }}",
        "{{ 'x'.translate({120: 'y'}) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}", "{{ namespace(__init__=1) }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}",
    ],
)  # fmt: skip
def test_what_a_template_may_not_do_is_an_ordinary_error(source: str) -> None:
    template = ChatTemplate(source, None, {})
    try:
        text = template([{"role": "user", "content": "x"}])
    except Exception:  # the kinds are jinja's and Python's
        return
    assert text == ""  # an unsafe attribute is undefined


@pytest.mark.parametrize(
    "source", ["{% if x %}", "{{ " + "(" * 5000, "{{ 'a'|nofilter }}", "{% for %}", "x" * 3_000_000]
)
def test_broken_sources_are_refused_at_once(source: str) -> None:
    with pytest.raises(ValueError, match=r"valid Jinja|characters"):
        ChatTemplate(source, None, {})(MESSAGES)


def test_long_conversations_are_no_attack() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 400
    assert len(ChatTemplate(TEMPLATE, None, {})(messages)) > 4_000_000


def test_conversations_with_tools_take_their_own_template() -> None:
    template = ChatTemplate("plain", "tools", {})
    assert (template(MESSAGES), template(MESSAGES, tools=[]), template(MESSAGES, tools=TOOLS)) == (
        "plain",
        "plain",
        "tools",
    )


@pytest.mark.parametrize("source", [TEMPLATE, TEMPLATE.replace("m['content']", "m['content'] | trim")])
@pytest.mark.parametrize("content", ["Once upon", "Once upon ", " a\n"])
def test_a_last_message_can_be_continued(source: str, content: str) -> None:
    chat = [{"role": "user", "content": "Begin."}, {"role": "assistant", "content": content}]
    (expected,), _ = render_jinja_template([chat], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source, None, {})(chat, continue_final_message=True) == expected
    with pytest.raises(ValueError, match="last message"):
        ChatTemplate("x", None, {})(chat, continue_final_message=True)
