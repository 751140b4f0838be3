"""Sessions of agents over six turns: what the server said comes back with its clients' own additions, and is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai
import pytest

from tests.ifprune_mlx.serving.http.scripted import Scripted
from tests.ifprune_mlx.serving.http.serving import WEATHER

CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
FUNCTIONS = [WEATHER, CLOCK]
PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
Call = tuple[str, dict[str, Any]]
OSLO, ROME, TIME = ("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"}), ("clock", {})


@dataclass
class Said:
    """An answer as a client has it."""

    text: str = ""
    thoughts: str = ""
    calls: list[Call] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


@dataclass
class Agent:
    """A conversation by one of the clients. `messages` grows by what the client itself returns."""

    script: Scripted
    stream: bool
    messages: list[Any] = field(default_factory=list)

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})


class OpenAIAgent(Agent):
    def ask(self, script: str) -> Said:
        self.script.say(script)
        tools: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
        asked: dict[str, Any] = {"model": "default", "messages": self.messages, "tools": tools, "max_tokens": 2000}
        with openai.OpenAI(base_url=f"{self.script.served.url}/v1", api_key="none", max_retries=0) as client:
            if not self.stream:
                message = client.chat.completions.create(**asked).choices[0].message
                self.messages.append(message)
                made = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]  # type: ignore[union-attr]
                return self._said(message.content or "", getattr(message, "reasoning_content", ""), made)
            with client.chat.completions.create(stream=True, **asked) as chunks:
                deltas = [chunk.choices[0].delta for chunk in chunks]
        text = "".join(delta.content or "" for delta in deltas)
        thoughts = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
        made = [(call.id, call.function.name, call.function.arguments) for d in deltas for call in d.tool_calls or []]
        calls = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in made]
        # As agents write it: fields that are empty, and null.
        self.messages.append({"role": "assistant", "content": text or None, "tool_calls": calls, "refusal": None})
        return self._said(text, thoughts, made)

    def _said(self, text: str, thoughts: str, made: list[Any]) -> Said:
        calls = [(name, json.loads(arguments)) for _, name, arguments in made]
        return Said(text, thoughts, calls, [identity for identity, _, _ in made])

    def results(self, ids: list[str], *results: str, odd: bool = False) -> None:
        for identity, result in zip(ids, results, strict=True):
            content: Any = [{"type": "text", "text": result}, {"type": "image_url"}] if odd else result
            self.messages.append({"role": "tool", "tool_call_id": identity, "content": content})

    def odd_history(self) -> None:
        """What other servers and models have left in the conversation."""
        broken = [
            {"id": f"call_{at}", "type": "function", "function": {"name": "clock", "arguments": arguments}}
            for at, arguments in enumerate(['{"zone": "CE', "null", "[1]", {"zone": "CET"}, None, ""])
        ]
        self.messages += [
            {"role": "assistant", "content": None, "tool_calls": broken},
            *({"role": "tool", "tool_call_id": call["id"], "content": "12:00"} for call in broken),
            {"role": "assistant", "content": None, "tool_calls": []},
        ]


class AnthropicAgent(Agent):
    def ask(self, script: str) -> Said:
        self.script.say(script)
        tools: list[Any] = [
            {"name": function["name"], "input_schema": function["parameters"], "cache_control": {"type": "ephemeral"}}
            for function in FUNCTIONS
        ]
        tools += [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124", "name": "bash"}]
        asked: dict[str, Any] = {
            "model": "default",
            "messages": self.messages,
            "tools": tools,
            "max_tokens": 2000,
            "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
            "extra_body": {"context_management": {"edits": []}, "betas": ["x"], "thinking": {"type": "adaptive"}},
        }
        with anthropic.Anthropic(base_url=self.script.served.url, api_key="none", max_retries=0) as client:
            if self.stream:
                with client.messages.stream(**asked) as events:
                    message: Any = events.get_final_message()
            else:
                message = client.messages.create(**asked)
        blocks = message.content
        self.messages.append({"role": "assistant", "content": [block.to_dict() for block in blocks]})
        for block in blocks:
            assert block.type != "thinking" or block.signature
        used = [block for block in blocks if block.type == "tool_use"]
        return Said(
            "".join(block.text for block in blocks if block.type == "text"),
            "".join(block.thinking for block in blocks if block.type == "thinking"),
            [(block.name, block.input) for block in used],
            [block.id for block in used],
        )

    def results(self, ids: list[str], *results: str, odd: bool = False) -> None:
        blocks: list[Any] = []
        for identity, result in zip(ids, results, strict=True):
            content: Any = result
            if odd:
                content = [{"type": "text", "text": result}, PIXEL, {"type": "tool_reference", "tool_name": "clock"}]
                content.append({"type": "document", "title": "Notes", "source": {"type": "text", "data": "It froze."}})
            blocks.append({"type": "tool_result", "tool_use_id": identity, "content": content})
        if odd:  # as Claude Code does
            blocks.append({"type": "text", "text": "<system-reminder>Go on.</system-reminder>"})
        self.messages.append({"role": "user", "content": blocks})

    def odd_history(self) -> None:
        """What Anthropic's own server and models have left in the conversation."""
        search = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "frost"}}
        found = {"type": "web_search_result", "title": "Frost", "url": "https://example.org", "encrypted_content": "x"}
        blocks = [
            {"type": "thinking", "thinking": "I search.", "signature": "sig"},
            {"type": "redacted_thinking", "data": "x"},
            search,
            {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [found]},
            {"type": "text", "text": "It says frost.", "citations": None},
            {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": None},
            {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": "soon"},
        ]
        results = [{"type": "tool_result", "tool_use_id": f"toolu_{at}", "is_error": True} for at in (1, 2)]
        self.messages += [
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": [*results, {"type": "container_upload", "file_id": "f"}, PIXEL]},
            {"role": "assistant", "content": []},
        ]
        self.messages.append({"role": "system", "content": "Be brief."})


def qwen(*calls: Call) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)


def mistral(*calls: Call) -> str:
    return "[TOOL_CALLS] " + json.dumps([{"name": n, "arguments": a} for n, a in calls])


def llama(*calls: Call) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


NO_ARGUMENTS = {"mistral": '[TOOL_CALLS] [{"name": "clock"}]', "llama": '{"name": "clock", "parameters": null}'}
FAMILIES = {"thinking": qwen, "opened": qwen, "mistral": mistral, "llama": llama}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, scripted_server: Callable[[str], Scripted]) -> tuple[str, Scripted]:
    return request.param, scripted_server(request.param)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("client", [OpenAIAgent, AnthropicAgent], ids=["openai", "anthropic"])
def test_a_session_of_six_turns(family: tuple[str, Scripted], client: type[Agent], stream: bool) -> None:
    name, server = family
    agent: Any = client(server, stream)
    call, draft = FAMILIES[name], FAMILIES[name](ROME)
    thoughts = f"I could write {draft}, or not." if name in ("thinking", "opened") else ""

    def thought(answer: str) -> str:
        opening = "" if name == "opened" else "<think>\n"
        return f"{opening}{thoughts}\n</think>\n\n{answer}" if thoughts else answer

    # 1: a call without arguments; a call that was drafted in thoughts is none.
    agent.user("What time is it?")
    said = agent.ask(thought(NO_ARGUMENTS.get(name, '<tool_call>\n{"name": "clock", "arguments": null}\n</tool_call>')))
    assert (said.text, said.thoughts, said.calls) == ("", thoughts, [TIME])
    assert all(re.fullmatch("[A-Za-z0-9]{9}", identity) for identity in said.ids)

    # 2: two calls at once.
    agent.results(said.ids, "12:00")
    said = agent.ask(thought(call(OSLO, ROME)))
    assert (said.text, said.thoughts, said.calls) == ("", thoughts, [OSLO, ROME])
    assert said.ids[0] != said.ids[1]
    assert "12:00" in server.prompt

    # 3: results with more than text in them; the answer speaks of calls.
    agent.results(said.ids, "-3 C", "9 C", odd=True)
    mention = 'It is cold. (A <tool_call> or [TOOL_CALLS] asks, {"name": 1} does not.)'
    said = agent.ask(thought(mention))
    assert (said.text, said.thoughts, said.calls) == (mention, thoughts, [])
    prompt = server.prompt
    assert prompt.index("Oslo") < prompt.index("-3 C") < prompt.index("9 C")
    if name == "llama":
        assert prompt.index("-3 C") < prompt.index('{"name": "weather", "parameters": {"city": "Rome"}}')
    if client is AnthropicAgent:
        assert "[tool_reference: clock]" in prompt
        assert "[document: Notes It froze.]" in prompt
        assert "Go on." in prompt

    # 4: what others have left in the conversation.
    agent.user("And now?")
    agent.odd_history()
    agent.user("Well?")
    said = agent.ask(thought("Still cold."))
    assert (said.text, said.thoughts, said.calls) == ("Still cold.", thoughts, [])
    prompt = server.prompt
    assert "Well?" in prompt
    if client is OpenAIAgent:
        assert json.dumps('{"zone": "CE')[1:-1] in prompt or '{"zone": "CE' in prompt
        assert '{"zone": "CET"}' in prompt
    else:
        assert "Be brief." in prompt
        if name in ("thinking", "opened"):
            assert "[server_tool_use: web_search frost]" in prompt
            assert "[web_search_tool_result: Frost https://example.org]" in prompt
            assert "<think>\nI search.\n</think>" in prompt

    # 5: a call that the limit cuts comes back as text.
    agent.user("Rome?")
    cut = call(ROME)[:-20]
    said = agent.ask(cut if name == "llama" else thought(f"I ask. {cut}"))
    assert said.calls == []
    assert said.text.endswith(cut)

    # 6: all of it is read again.
    agent.user("Once more.")
    said = agent.ask(thought(call(ROME)))
    assert (said.text, said.calls) == ("", [ROME])
    assert server.prompt.index("Well?") < server.prompt.index("Once more.")


def test_server_tools_are_left_out_and_said_once(scripted_server: Callable[[str], Scripted]) -> None:
    server = scripted_server("llama")
    for _ in range(2):
        agent = AnthropicAgent(server, stream=False)
        agent.user("Hello")
        agent.ask("Hi")
    lines = [line for line in server.served.stderr if "web_search_20250305" in line]
    assert len(lines) == 1
    assert "left out" in lines[0]
