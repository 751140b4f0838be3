"""Servers of tiny models that say what a test wants, with chat templates in the shape of real families.

Everything is real but the choice of tokens: in the server's process, a logits processor raises the scripted ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from tests.ifprune_mlx.serving.http.serving import Served, serving
from tests.tiny import TEMPLATE, add_tokens, write_source

END = "<|im_end|>"
_QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set tool_call = call.function or call %}\n<tool_call>\n"
    '{"name": "{{ tool_call.name }}", "arguments": {% if tool_call.arguments is string %}{{ tool_call.arguments }}'
    "{% else %}{{ tool_call.arguments | tojson }}{% endif %}}\n</tool_call>{% endfor %}"
)
_QWEN = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}" + _QWEN_CALLS + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# Mistral: ids of nine characters, tools before the last message of the user, roles that alternate.
_MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}{% endif %}"
    "{% set ns = namespace(users=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (ns.users % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant!') }}{% endif %}"
    "{% set ns.users = ns.users + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]'
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# Llama 3: one call at a time, which is JSON without marks; results are of the role `ipython`.
_LLAMA = (
    "{% macro head(role) %}<|im_start|>{{ role }}\n\n{% endmacro %}{% for tool in tools or [] %}"
    'Respond in the format {"name": function name, "parameters": dictionary}.\n{{ tool | tojson }}\n{% endfor %}'
    "{% for m in messages %}{% if m.role == 'tool' %}{{ head('ipython') }}{{ m.content }}<|im_end|>"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ head('assistant') }}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>'
    "{% else %}{{ head(m.role) }}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
_THINK = ("<think>", "</think>")
# Chat templates, and the marks of thoughts in the vocabulary.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    # Qwen3: thinks unless `enable_thinking` is false.
    "thinking": (_QWEN + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}", _THINK),
    # QwQ, DeepSeek-R1: the template opens the thoughts, and there is no switch.
    "opened": (_QWEN + "<think>\n{% endif %}", _THINK),
    # Models that begin their thoughts themselves, without a switch; and with marks that are no tokens of their own.
    "unswitched": ("{{ style }}" + _QWEN + "{% endif %}{# </think> #}", _THINK),
    "bracketed": (TEMPLATE + "{# [THINK] thoughts [/THINK] #}", ()),
    "mistral": (_MISTRAL, ()),
    "llama": (_LLAMA, ()),
}


def write_templated(folder: Path, template: str, marks: tuple[str, ...] = ()) -> Path:
    """A checkpoint of a tiny random model with a chat template, in whose vocabulary `marks` are tokens."""
    source = write_source(folder.with_name(f"source-of-{folder.name}"), max_position_embeddings=16384)
    add_tokens(source, marks)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    convert(open_source(source), folder, Options())
    return folder


class Scripted:
    """A server under way whose next answers are given.

    Attributes:
        served: the server.
    """

    def __init__(self, served: Served, checkpoint: Path, script: Path) -> None:
        self.served = served
        self._tokenizer: Any = load_tokenizer(checkpoint)
        self._script = script

    def say(self, text: str) -> None:
        """All answers are this from now on, where nothing else decides."""
        self._script.write_text(json.dumps(self._tokenizer.encode(text + END, add_special_tokens=False)))

    @property
    def prompt(self) -> str:
        """What the model has read before its last answer."""
        text: str = self._tokenizer.decode(json.loads(self._script.with_suffix(".prompt").read_text()))
        return text


@contextmanager
def scripted(folder: Path, family: str, *options: str) -> Iterator[Scripted]:
    """A server of a tiny model with the tokenizer of a family."""
    checkpoint, script = write_templated(folder / "checkpoint", *FAMILIES[family]), folder / "script.json"
    prelude = "from tests.ifprune_mlx.serving.http.script_tokens import install; install()"
    env = {"IFPRUNE_TEST_SCRIPT": str(script)}
    with serving(checkpoint, folder / "cache", "--dense", *options, env=env, prelude=prelude) as served:
        yield Scripted(served, checkpoint, script)
