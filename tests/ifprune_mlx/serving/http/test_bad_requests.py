"""Requests that cannot be answered: each is refused with a 4xx and a reason, and the server goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.ifprune_mlx.serving.http.serving import Served

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Bad:
    """A request, the status it gets, and what its reason contains."""

    path: str
    body: Any
    reason: str
    status: int = 400
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"


def chat(reason: str, status: int = 400, **fields: Any) -> Bad:
    return Bad(CHAT, {"messages": HELLO, "max_tokens": 4, **fields}, reason, status)


def said(reason: str, *messages: Any) -> Bad:
    return Bad(CHAT, {"messages": list(messages)}, reason)


def text(reason: str, **fields: Any) -> Bad:
    return Bad(TEXT, {"prompt": "Hello", "max_tokens": 4, **fields}, reason)


def message(reason: str, **fields: Any) -> Bad:
    return Bad(MESSAGES, {"messages": HELLO, "max_tokens": 4, **fields}, reason)


TOOL = {"type": "function", "function": {"name": "f"}}
CASES = {
    "empty body": Bad(CHAT, b"", "not JSON"),
    "no JSON": Bad(CHAT, b"hello", "not JSON"),
    "half JSON": Bad(CHAT, b'{"messages": [', "not JSON"),
    "not UTF-8": Bad(CHAT, b'{"messages": "\xff"}', "UTF-8"),
    "an array": Bad(CHAT, b"[]", "must be a JSON object"),
    "a number": Bad(CHAT, b"1", "must be a JSON object"),
    "deep": Bad(CHAT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too deeply"),
    "NaN": Bad(CHAT, b'{"messages": [], "temperature": NaN}', "NaN"),
    "infinite": Bad(CHAT, b'{"messages": [], "temperature": 1e999}', "too large"),
    "long number": Bad(CHAT, b'{"messages": [], "n": ' + b"9" * 10_000 + b"}", "not JSON"),
    "key twice": Bad(CHAT, b'{"messages": [], "messages": []}', "twice"),
    "half a surrogate pair": Bad(CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    "a mark before": Bad(CHAT, b'\xef\xbb\xbf{"messages": []}', "not JSON"),
    "no messages": Bad(CHAT, {}, "messages: is required"),
    "null messages": Bad(CHAT, {"messages": None}, "messages: is required"),
    "empty messages": Bad(CHAT, {"messages": []}, "messages: is empty"),
    "messages no array": Bad(CHAT, {"messages": "Hello"}, "messages: must be an array"),
    "message no object": said("messages[0]: must be an object", "Hello"),
    "no role": said("messages[0].role: is required", {"content": "Hello"}),
    "unknown role": said("messages[0].role: must be one of", {"role": "king", "content": "Hello"}),
    "no content": said("messages[0].content: is required", {"role": "user"}),
    "content a number": said("messages[0].content: must be a string", {"role": "user", "content": 1}),
    "an image": said("text only", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    "part without text": said("text: is required", {"role": "user", "content": [{"type": "text"}]}),
    "tool without id": said("tool_call_id: is required", {"role": "tool", "content": "x"}),
    "tool message": said("has no tools", *HELLO, {"role": "tool", "content": "x", "tool_call_id": "a"}),
    "call without function": said(
        "tool_calls[0].function: is required", {"role": "assistant", "tool_calls": [{"type": "function"}]}
    ),
    "another model": chat("not served", 404, model="gpt-9"),
    "model a number": chat("model: must be a string", model=1),
    "hot": chat("temperature: must be from 0 to 2", temperature=3),
    "temperature text": chat("temperature: must be a number", temperature="hot"),
    "temperature true": chat("temperature: must be a number", temperature=True),
    "no nucleus": chat("top_p: must be above 0", top_p=0),
    "top_k": chat("top_k: must be from 0", top_k=-1),
    "min_p": chat("min_p: must be from 0 to 1", min_p=2),
    "penalty": chat("presence_penalty: must be from -2 to 2", presence_penalty=9),
    "repetition": chat("repetition_penalty: must be above 0", repetition_penalty=0),
    "half a seed": chat("seed: must be a whole number", seed=1.5),
    "no tokens": chat("max_tokens: must be from 1", max_tokens=0),
    "no n": chat("n: must be from 1", n=0),
    "many": chat("at most", n=100_000),
    "stream text": chat("stream: must be true or false", stream="yes"),
    "options alone": chat("needs stream", stream_options={"include_usage": True}),
    "stop a number": chat("stop: must be a string", stop=1),
    "empty stop": chat("stop[0]: is empty", stop=[""]),
    "stops": chat("at most 16", stop=["a"] * 17),
    "bias of no token": chat("no token id", logit_bias={"x": 1}),
    "bias beyond": chat("no token id", logit_bias={"99999": 1}),
    "bias large": chat("logit_bias.5: must be from -100 to 100", logit_bias={"5": 1000}),
    "top_logprobs alone": chat("needs logprobs", top_logprobs=2),
    "top_logprobs": chat("top_logprobs: must be from 0 to 20", logprobs=True, top_logprobs=21),
    "another format": chat("response_format.type: must be one of", response_format={"type": "xml"}),
    "tools": chat("has no tools", tools=[TOOL]),
    "tool without function": chat("function: is required", tools=[{"type": "function"}]),
    "tool of another kind": chat("must be 'function'", tools=[{"type": "retrieval"}]),
    "forced nothing": chat("needs tools", tool_choice="required"),
    "forced another": chat(
        "none of the tools", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}
    ),
    "a drafting model": chat("draft_model: is not supported; leave it out", draft_model="tiny"),
    "functions": chat("use tools", functions=[{"name": "f"}]),
    "density negative": chat("ifprune.density: must be above 0", ifprune={"density": -0.5}),
    "density above": chat("ifprune.density: must be above 0 and at most 1", ifprune={"density": 1.5}),
    "selector": chat("ifprune.selector: must be one of", ifprune={"selector": "best"}),
    "learned without predictor": chat("no trained predictor", ifprune={"selector": "learned"}),
    "policy": chat("ifprune.policy: must be one of", ifprune={"policy": "always"}),
    "a misspelt option": chat("ifprune.densty: is unknown", ifprune={"densty": 0.5}),
    "task": chat("no task 'nothing'", ifprune={"task": "nothing"}),
    "task path": chat("no task '../../etc/passwd'", ifprune={"task": "../../etc/passwd"}),
    "task and density": chat("excludes ifprune.task", ifprune={"task": "a", "density": 0.5}),
    "dense and density": chat("excludes ifprune.dense", ifprune={"dense": True, "density": 0.5}),
    "few parameters": chat("too few", ifprune={"active_parameters": 5}),
    "ifprune text": chat("ifprune: must be an object", ifprune="fast"),
    "density header": Bad(CHAT, {"messages": HELLO}, "x-ifprune-density", headers={"x-ifprune-density": "lots"}),
    "density header NaN": Bad(CHAT, {"messages": HELLO}, "x-ifprune-density", headers={"x-ifprune-density": "nan"}),
    "policy header": Bad(CHAT, {"messages": HELLO}, "x-ifprune-policy", headers={"x-ifprune-policy": "x"}),
    "task header": Bad(CHAT, {"messages": HELLO}, "no task", headers={"x-ifprune-task": "x"}),
    "too long": said("context holds", {"role": "user", "content": "ab " * 200}),
    "a million tokens": said("characters", {"role": "user", "content": "a " * 1_000_000}),
    "no prompt": Bad(TEXT, {}, "prompt: is required"),
    "empty prompt": text("prompt is empty", prompt=""),
    "empty prompts": text("prompt: must be", prompt=[]),
    "mixed prompts": text("nothing else", prompt=["a", 1]),
    "unknown ids": text("token ids from 0", prompt=[10**6]),
    "negative ids": text("token ids from 0", prompt=[-1]),
    "empty ids": text("is empty", prompt=[[]]),
    "echo": text("echo: is not supported", echo=True),
    "suffix": text("suffix: is not supported", suffix="x"),
    "best_of": text("best_of", best_of=5),
    "no max_tokens": Bad(MESSAGES, {"messages": HELLO}, "max_tokens: is required"),
    "system number": message("system: must be a string", system=1),
    "another role": message("messages[0].role: must be one of", messages=[{"role": "king", "content": "x"}]),
    "system alone": message("message of the user", messages=[{"role": "system", "content": "x"}]),
    "assistant alone": message("message of the user", messages=[{"role": "assistant", "content": "x"}]),
    "block without type": message("type: is required", messages=[{"role": "user", "content": [{"text": "x"}]}]),
    "block no object": message(
        "messages[0].content[0]: must be an object", messages=[{"role": "user", "content": [1]}]
    ),
    "forced server tool": message(
        "needs tools", tools=[{"type": "web_search_20250305", "name": "web_search"}], tool_choice={"type": "any"}
    ),
    "stop_sequences": message("stop_sequences", stop_sequences=[1]),
    "choice": message("tool_choice.type", tool_choice={"type": "some"}),
    "unknown path": Bad("/v1/nothing", {}, "no such path", 404),
    "method": Bad(CHAT, None, "is not for this path", 405, method="GET"),
    "delete": Bad("/health", None, "is not for this path", 405, method="DELETE"),
    "unknown model page": Bad("/v1/models/gpt-9", None, "not served", 404, method="GET"),
    "unknown selection": Bad("/v1/ifprune/selections/0000", None, "no such selection", 404, method="GET"),
    "path of a file": Bad("/page/../../app.py", None, "no such path", 404, method="GET"),
    "path in code": Bad("/%2e%2e/%2e%2e/etc/passwd", None, "no such path", 404, method="GET"),
    "file of the page's folder": Bad("/index.html", None, "no such path", 404, method="GET"),
    "another host": Bad("/health", None, "names another host", 403, {"Host": "evil.example"}, "GET"),
    "another origin": Bad(CHAT, {"messages": HELLO}, "another origin", 403, {"Origin": "https://evil.example"}),
    "a file's origin": Bad(CHAT, {"messages": HELLO}, "another origin", 403, {"Origin": "null"}),
    "large": Bad(CHAT, b" " * 10_000_001, "larger than 10000000", 413),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_refused_with_a_reason(served: Served, case: Bad) -> None:
    content = case.body if isinstance(case.body, bytes) or case.body is None else json.dumps(case.body).encode()
    response = httpx.request(case.method, served.url + case.path, content=content, headers=case.headers, timeout=60)
    assert response.status_code == case.status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert case.reason in error["message"]
    if case.path == MESSAGES:
        assert response.json()["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}
    assert served.get("/health").json()["status"] == "ok"


def test_the_table_is_as_long_as_it_claims() -> None:
    assert len(CASES) >= 60
