"""Large bodies block neither the event loop nor small ones, and only so many are held at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from ifprune_mlx import load
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.http import app as app_module
from ifprune_mlx.serving.http import openai as openai_module
from ifprune_mlx.serving.http.app import make_app
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer
from ifprune_mlx.serving.http.middleware import Limits
from ifprune_mlx.serving.http.service import Service
from tests.tiny import write_checkpoint

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
FEW: dict[str, Any] = {"max_tokens": 1, "ifprune": {"selector": "static"}}
SMALL = FEW | {"messages": [{"role": "user", "content": "Hello"}]}
LARGE = FEW | {"messages": [{"role": "user", "content": "a" * 70_000}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("large")
    model, tokenizer = load(write_checkpoint(folder / "checkpoint", max_position_embeddings=16384))
    engine = Engine(model, tokenizer)
    service = Service(model, tokenizer, engine, name="tiny")
    yield service
    engine.close()
    service.close()
    model.close()


class Gate:
    """Holds whoever comes to it in a thread, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, self._patch = threading.Event(), threading.Event(), patch
        self.threads: set[int] = set()

    def at(self, owner: Any, name: str) -> None:
        held = getattr(owner, name)

        def waiting(*given: Any, **options: Any) -> Any:
            self.threads.add(threading.get_ident())
            self.reached.set()
            assert self.opened.wait(30)
            return held(*given, **options)

        self._patch.setattr(owner, name, waiting)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@asynccontextmanager
async def client(service: Service, limits: Limits | None = None) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(make_app(service, limits or Limits()))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as made:
        yield made


async def until(true: Callable[[], Any]) -> None:
    for _ in range(3000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (app_module, "decode_json"),
        (app_module, "_decode_and_check"),
        (openai_module, "_prompts"),
        (openai_module, "_conversation"),
        (ChatRenderer, "_check_length"),
        (Service, "check_model"),
        (Service, "_selection_options"),
    ],
)
def test_the_event_loop_goes_on_while_a_body_is_prepared(
    service: Service, gate: Gate, path: str, owner: Any, name: str
) -> None:
    gate.at(owner, name)

    async def ask() -> None:
        async with client(service) as asking:
            body = FEW | {"prompt": "Hello"} if path == TEXT else SMALL
            answer = asyncio.ensure_future(asking.post(path, json=body))
            await until(lambda: gate.reached.is_set() or answer.done())
            health = await asking.get("/health")
            assert health.status_code == 200
            gate.opened.set()
            assert (await answer).status_code == 200
            assert threading.get_ident() not in gate.threads

    asyncio.run(ask())


def test_small_bodies_are_answered_while_large_ones_are_prepared(service: Service, gate: Gate) -> None:
    decode = app_module.decode_json
    gate.at(app_module, "decode_json")
    held = app_module.decode_json
    gate._patch.setattr(app_module, "decode_json", lambda body: (held if len(body) > 60_000 else decode)(body))

    async def ask() -> list[int]:
        async with client(service) as asking:
            large = [asyncio.ensure_future(asking.post(CHAT, json=LARGE)) for _ in range(6)]
            await until(gate.reached.is_set)
            assert (await asking.post(CHAT, json=SMALL)).status_code == 200
            assert not any(answer.done() for answer in large)
            gate.opened.set()
            return [answer.status_code for answer in await asyncio.gather(*large)]

    assert asyncio.run(ask()) == [400] * 6  # longer than the context


def test_only_so_many_bytes_are_held(service: Service, gate: Gate) -> None:
    gate.at(app_module, "decode_json")
    limits = Limits(max_body=75_000)

    async def ask() -> list[httpx.Response]:
        async with client(service, limits) as asking:
            answers = [asyncio.ensure_future(asking.post(CHAT, json=LARGE)) for _ in range(12)]
            await until(lambda: sum(answer.done() for answer in answers) == 4)
            gate.opened.set()
            await asyncio.gather(*answers)
            assert (await asking.post(CHAT, json=LARGE)).status_code == 400  # nothing is held any more
            return [await answer for answer in answers]

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 4
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"too_many_bytes"}
    assert [answer.status_code for answer in answers if answer not in refused] == [400] * 8


def test_a_client_that_leaves_gives_its_bytes_back(service: Service) -> None:
    """In the middle of its body."""

    async def ask() -> None:
        app = make_app(service, Limits(max_body=100))
        parts = [{"type": "http.request", "body": b"a" * 90, "more_body": True}, {"type": "http.disconnect"}]
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
        for _ in range(20):
            left = iter(parts)

            async def receive(left: Iterator[dict[str, Any]] = left) -> dict[str, Any]:
                return next(left)

            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            headers = [(b"host", b"127.0.0.1")]
            call: Callable[..., Awaitable[None]] = app
            await call({**scope, "headers": headers, "state": {}}, receive, send)
            assert sent[0]["status"] == 400

    asyncio.run(ask())


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[' + b",".join([b"{}"] * 60_000) + b"]}",
        b'{"messages":[{"role":"user","content":[' + b",".join([b'{"type":"text","text":"a"}'] * 60_000) + b"]}]}",
        b'{"tools":[' + b",".join([b'{"a":{"b":1}}'] * 30_000) + b"]}",
    ],
    ids=["messages", "parts", "tools"],
)
def test_a_body_of_very_many_objects_is_refused(service: Service, body: bytes) -> None:
    async def ask() -> httpx.Response:
        async with client(service) as asking:
            return await asking.post(CHAT, content=body)

    refused = asyncio.run(ask())
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert "50000 objects" in refused.text


def test_six_prompts_of_one_and_a_half_million_ids(service: Service) -> None:
    """They are refused, and health is told all the while."""
    ids = json.dumps({"prompt": [5] * 1_500_000}).encode()

    async def ask() -> int:
        async with client(service) as asking:
            answers = [asyncio.ensure_future(asking.post(TEXT, content=ids)) for _ in range(6)]
            told = 0
            while not all(answer.done() for answer in answers):
                told += (await asking.get("/health")).status_code == 200
                await asyncio.sleep(0.01)
            for answer in answers:
                error = (await answer).json()["error"]
                assert error["code"] == "context_length_exceeded"
            return told

    assert asyncio.run(ask()) > 6
