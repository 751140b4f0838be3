"""A stream begins at once, and says what it waits for; what can be known before is refused with a status."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.tiny import write_checkpoint

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
STATIC: dict[str, Any] = {"max_tokens": 4, "ifprune": {"selector": "static"}}
LONG = "A long prompt. " * 200  # 3000 tokens: each byte is one
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: STATIC | {"messages": HELLO},
    TEXT: STATIC | {"prompt": "Hello"},
    MESSAGES: STATIC | {"messages": HELLO},
}
# While the file is there, the model stands still, before every step. Streams that wait say so often.
HELD = (
    "import os, time; from ifprune_mlx.serving.http import service; service.SILENCE_SECONDS = 0.1; "
    "from ifprune_mlx.serving.engine.decoder import BatchDecoder as at; step = at.step; "
    "hold = lambda: os.path.exists(os.environ['HOLD']) and not time.sleep(0.01); "
    "at.step = lambda self: (all(iter(hold, False)), step(self))[1]"
)


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make this file, and the model stands still; remove it, and it goes on."""
    return tmp_path_factory.mktemp("hold") / "now"


@pytest.fixture(scope="module")
def slow(hold: Path) -> Iterator[Served]:
    """A server whose model can be held."""
    checkpoint = write_checkpoint(hold.with_name("checkpoint"), max_position_embeddings=8192)
    limits = ("--concurrency", "1", "--queue", "1")
    with serving(checkpoint, hold.parent, *limits, env={"HOLD": str(hold)}, prelude=HELD) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(hold: Path) -> Iterator[None]:
    yield
    hold.unlink(missing_ok=True)


@pytest.mark.parametrize("path", BODIES)
def test_headers_and_signs_of_life_come_while_the_model_stands_still(slow: Served, hold: Path, path: str) -> None:
    hold.touch()
    body = BODIES[path] | {"stream": True}
    with httpx.stream("POST", slow.url + path, json=body, timeout=60) as first:
        assert first.status_code == 200
        assert first.headers["content-type"].startswith("text/event-stream")
        eventually(lambda: slow.metric("ifprune_jobs_running") == 1)
        with httpx.stream("POST", slow.url + path, json=body, timeout=60) as second:  # it queues
            lines = second.iter_lines()
            sign = "event: ping" if path == MESSAGES else ": queued"
            for _ in range(3):
                assert any(line == sign for line in lines)
            hold.unlink()
            rest = list(lines)
        ended = list(first.iter_lines())
    for end in (rest, ended):
        assert ("event: message_stop" if path == MESSAGES else "data: [DONE]") in end


def test_reading_is_told_part_by_part(slow: Served) -> None:
    for path, prompt in ((CHAT, {"messages": [{"role": "user", "content": LONG}]}), (TEXT, {"prompt": LONG})):
        body = BODIES[path] | prompt | {"stream": True, "ifprune": {"selector": "random"}}
        text = slow.post(path, body).text
        parts = [line.removeprefix(": reading ") for line in text.split("\n\n") if line.startswith(": reading ")]
        read = [int(part.split("/")[0]) for part in parts]
        assert read[0] == 0
        assert read == sorted(read)
        assert len(set(read)) > 5
        assert {int(part.split("/")[1]) for part in parts} == {read[-1]}
        assert text.index(": reading") < text.index('"text"' if path == TEXT else '"content":""') or path == CHAT


def test_the_activation_selector_tells_what_it_reads(slow: Served) -> None:
    body = BODIES[TEXT] | {"prompt": LONG, "stream": True, "ifprune": {"selector": "activation"}}
    text = slow.post(TEXT, body).text
    assert ": reading 512/3000\n\n" in text
    assert ": reading 1024/3000\n\n" in text


def test_the_clients_read_such_streams(slow: Served, hold: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": LONG}]
    options: dict[str, Any] = {"model": "default", "messages": messages, "max_tokens": 4, "extra_body": {"seed": 1}}
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**options).choices[0].message.content
        hold.touch()
        with client.chat.completions.create(stream=True, **options) as stream:
            time.sleep(0.3)  # some comments
            hold.unlink()
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    with anthropic.Anthropic(base_url=slow.url, api_key="none", max_retries=0) as other:
        hold.touch()
        with other.messages.stream(**options) as events:
            time.sleep(0.3)  # some pings
            hold.unlink()
            assert events.get_final_text() == whole


@pytest.mark.parametrize(
    ("path", "fields", "status", "code"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a" * 9000}]}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": "a" * 9000}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": [5] * 9000}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": ["a", ""]}, 400, "invalid_prompt"),
        (CHAT, {"model": "another"}, 404, "model_not_found"),
        (CHAT, {"ifprune": {"task": "none"}}, 400, "task_not_found"),
        (CHAT, {"ifprune": {"selector": "learned"}}, 400, None),
        (CHAT, {"ifprune": {"selector": "static", "active_parameters": 1}}, 400, None),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools_not_supported"),
        (CHAT, {"n": 3}, 400, None),
    ],
)
def test_what_can_be_known_before_has_a_status(
    slow: Served, path: str, fields: dict[str, Any], status: int, code: str | None
) -> None:
    refused = slow.post(path, BODIES[path] | {"stream": True} | fields)
    assert refused.status_code == status
    assert refused.headers["content-type"] == "application/json"
    assert refused.json()["error"]["code"] == code


def test_messages_that_are_too_long_have_a_status(slow: Served) -> None:
    body = BODIES[MESSAGES] | {"stream": True, "messages": [{"role": "user", "content": "a" * 9000}]}
    refused = slow.post(MESSAGES, body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_full_server_refuses_streams_with_a_status(slow: Served, hold: Path) -> None:
    hold.touch()
    body = BODIES[CHAT] | {"stream": True}
    with httpx.stream("POST", slow.url + CHAT, json=body, timeout=60):
        eventually(lambda: slow.metric("ifprune_jobs_running") == 1)
        two = slow.post(CHAT, body | {"n": 2})  # there is room for one
        assert (two.status_code, two.json()["error"]["code"]) == (429, "queue_full")
        eventually(lambda: slow.metric("ifprune_jobs_waiting") == 0)
        with httpx.stream("POST", slow.url + CHAT, json=body, timeout=60) as waits:
            assert waits.status_code == 200
            assert slow.post(CHAT, body).status_code == 429
            hold.unlink()


def test_a_word_of_a_template_does_not_make_a_prompt_too_long(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    settings = checkpoint / "tokenizer_config.json"
    template = "{{ raise_exception('there is no context for this') }}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][settings.name]["size"] = settings.stat().st_size
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with serving(checkpoint, tmp_path) as server:
        refused = server.post(CHAT, BODIES[CHAT])
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_prompt")


def test_the_selection_is_told_once(slow: Served, hold: Path) -> None:
    """However long the model then stands still."""
    hold.touch()
    with httpx.stream("POST", slow.url + CHAT, json=BODIES[CHAT] | {"stream": True}, timeout=60) as answer:
        lines, begun = answer.iter_lines(), [""]
        while sum(line.startswith(": reading ") for line in begun) < 3 and len(begun) < 1000:
            begun.append(next(lines))
        hold.unlink()
        told = [line for line in (*begun, *lines) if line.startswith(": selection ")]
    assert len(told) == 1


def test_who_leaves_a_stream_that_waits_is_noticed(slow: Served, hold: Path) -> None:
    before = slow.metric("ifprune_jobs_cancelled_total")
    hold.touch()
    with httpx.stream("POST", slow.url + CHAT, json=BODIES[CHAT] | {"stream": True}, timeout=60) as answer:
        next(answer.iter_raw())
    # Else the model, let go, may have given all of the short answer before the server knows.
    eventually(lambda: any("the client went away" in line for line in slow.stderr))
    hold.unlink()
    eventually(partial(_is, slow, "ifprune_jobs_cancelled_total", before + 1))


def _is(served: Served, name: str, value: float) -> bool:
    return served.metric(name) == value
