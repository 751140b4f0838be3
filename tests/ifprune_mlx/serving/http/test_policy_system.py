"""Policy `system`: agents select by system prompt and tool names, so that their long prompts are read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import run
from tests.ifprune_mlx.serving.http.serving import Served, serving
from tests.tiny import write_checkpoint

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
PROMPT = "You are an agent that works with files. " * 20  # 800 tokens: each byte is one
SELECTORS = ["random", "activation", "static"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("system")
    return write_checkpoint(folder / "checkpoint", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def agents(checkpoint: Path) -> Iterator[Served]:
    """A server on which all requests select by what stays."""
    with serving(checkpoint, checkpoint.parent, "--policy", "system", "--max-tokens", "4") as server:
        yield server


def figures(served: Served, path: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}
    answer = served.post(path, body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["ifprune"]
    return found


def said(served: Served, text: str, system: str, selector: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return figures(served, CHAT, text, messages=messages, ifprune={"selector": selector}, **fields)


@pytest.mark.parametrize("selector", SELECTORS)
def test_other_conversations_of_an_agent_reuse_its_prompt(agents: Served, selector: str) -> None:
    system = f"{selector}: {PROMPT}"
    hits = agents.metric("ifprune_prefix_hits_total")
    cached = agents.metric("ifprune_cached_prompt_tokens_total")
    first = said(agents, "List the files.", system, selector)
    second = said(agents, "Something else altogether", system, selector)
    assert first["selector"] == selector
    assert first["cached_tokens"] == 0
    assert second["selection"] == first["selection"]
    assert second["cached_tokens"] >= len(system)
    assert agents.metric("ifprune_prefix_hits_total") == hits + 1
    assert agents.metric("ifprune_cached_prompt_tokens_total") == cached + second["cached_tokens"]


def test_a_later_turn_keeps_the_selection_too(agents: Served) -> None:
    first = said(agents, "One", PROMPT, "random")
    turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "ok"}]
    messages = [{"role": "system", "content": PROMPT}, *turns, {"role": "user", "content": "Two"}]
    later = figures(agents, CHAT, "", messages=messages, ifprune={"selector": "random"})
    assert later["selection"] == first["selection"]


@pytest.mark.parametrize("selector", ["random", "activation"])
def test_another_system_prompt_selects_anew(agents: Served, selector: str) -> None:
    one, other = (said(agents, "Hello", text, selector)["selection"] for text in (PROMPT, "0123456789 " * 60))
    assert one != other


def test_a_request_may_say_otherwise(agents: Served) -> None:
    def first(text: str) -> str:
        messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
        options = {"selector": "random", "policy": "first"}
        return str(figures(agents, CHAT, text, messages=messages, ifprune=options)["selection"])

    assert first("One") != first("Two")


def test_without_a_system_prompt_the_first_message_selects(agents: Served) -> None:
    random = {"selector": "random"}
    one, same, other = (figures(agents, CHAT, text, ifprune=random)["selection"] for text in ("One", "One", "Two"))
    assert one == same != other
    first = figures(agents, CHAT, "One", ifprune=random | {"policy": "first"})["selection"]
    assert one == first


def test_messages_of_anthropic_select_alike(agents: Served) -> None:
    random = {"selector": "random"}
    one = figures(agents, MESSAGES, "One", system=PROMPT, ifprune=random)
    other = figures(agents, MESSAGES, "Two", system=[{"type": "text", "text": PROMPT}], ifprune=random)
    assert one["selection"] == other["selection"] == said(agents, "Three", PROMPT, "random")["selection"]


def test_the_names_of_tools_select_as_well(served_tools: Served) -> None:
    def chosen(text: str, *names: str) -> str:
        tools = [{"type": "function", "function": {"name": name, "description": text}} for name in names]
        options = {"selector": "random", "policy": "system"}
        return str(figures(served_tools, CHAT, text, tools=tools, ifprune=options)["selection"])

    assert chosen("One", "read", "write") == chosen("Two", "write", "read")
    assert chosen("One", "read", "write") != chosen("One", "read")
    headers = {"x-ifprune-policy": "system"}
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "tools": []}
    assert served_tools.post(CHAT, body, headers=headers).status_code == 200


@pytest.mark.parametrize("other", [("--dense",), ("--task", "french")])
def test_what_it_excludes(checkpoint: Path, tmp_path: Path, other: tuple[str, ...]) -> None:
    result = run("serve", "--model", checkpoint, "--port", "0", "--policy", "system", *other, cache=tmp_path)
    assert result.returncode == 1
    assert f"{other[0]} and --policy exclude each other" in result.stderr
