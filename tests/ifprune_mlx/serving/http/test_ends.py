"""How requests end from outside: the server is told to end, or the client closes its side of the connection."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.tiny import write_checkpoint

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS: dict[str, Any] = {"max_tokens": 32000, "logit_bias": {"2": -100}, "ifprune": {"selector": "static"}}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: ENDLESS | {"messages": HELLO},
    TEXT: ENDLESS | {"prompt": "Hello"},
    MESSAGES: ENDLESS | {"messages": HELLO},
}
HASTE = "from ifprune_mlx.serving.http import server; server._STOP_SECONDS = 0.5"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ends") / "checkpoint", max_position_embeddings=32768)


@pytest.fixture(scope="module")
def lasting(checkpoint: Path) -> Iterator[Served]:
    with serving(checkpoint, checkpoint.parent) as server:
        yield server


def streamed(server: Served, path: str) -> str:
    with httpx.stream("POST", server.url + path, json=BODIES[path] | {"stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        return answer.read().decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_under_way_are_told_that_the_server_ends(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Those that run, and one that waits, in all forms."""
    with (
        serving(checkpoint, tmp_path, "--concurrency", "5", prelude=HASTE) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        whole = [pool.submit(server.post, path, BODIES[path]) for path in BODIES]
        streams = [pool.submit(streamed, server, path) for path in BODIES]
        eventually(lambda: server.metric("ifprune_jobs_running") == 5 and server.metric("ifprune_jobs_waiting") == 1)
        server.process.send_signal(number)
        for path, answer in zip(BODIES, whole, strict=True):
            refused = answer.result(60)
            assert refused.status_code == 503
            assert refused.headers["content-type"] == "application/json"
            error = refused.json()["error"]
            assert "shutting down" in error["message"]
            assert error["type"] == ("overloaded_error" if path == MESSAGES else "server_error")
        for path, stream in zip(BODIES, streams, strict=True):
            text = stream.result(60)
            *_, last = [line for line in text.splitlines() if line.startswith("data: ")]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert "shutting down" in error["message"]
            assert "[DONE]" not in text
            assert ("event: error" in text) == (path == MESSAGES)
        assert server.process.wait(60) == 0


def test_an_answer_that_ends_soon_is_given_though_the_server_ends(checkpoint: Path, tmp_path: Path) -> None:
    slow = HASTE.replace("0.5", "20.0")
    with serving(checkpoint, tmp_path, prelude=slow) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, CHAT, BODIES[CHAT] | {"max_tokens": 600})
        eventually(lambda: server.metric("ifprune_jobs_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result(60).json()["usage"]["completion_tokens"] == 600
        assert server.process.wait(60) == 0


def test_a_body_that_is_not_there_in_time_is_a_503(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, prelude=HASTE) as server, socket.create_connection(server.address) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        server.get("/health")
        server.process.send_signal(signal.SIGTERM)
        received = read_all(client)
        assert received.startswith(b"HTTP/1.1 503")
        assert b"shutting down" in received
        assert server.process.wait(60) == 0


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(60)
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def raw(path: str, body: dict[str, Any], version: str = "1.1") -> bytes:
    sent = json.dumps(body).encode()
    return f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent


def half_closed(server: Served, sent: bytes) -> bytes:
    """What comes to a client that closes its side as soon as it has sent all."""
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_closes_its_side_gets_its_answer(lasting: Served, path: str, stream: bool, version: str) -> None:
    body = BODIES[path] | {"max_tokens": 200, "stream": stream}
    head, _, answer = half_closed(lasting, raw(path, body, version)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    if stream:
        assert (b"message_stop" if path == MESSAGES else b"[DONE]") in answer
    else:
        usage = json.loads(answer)["usage"]
        assert usage["output_tokens" if path == MESSAGES else "completion_tokens"] == 200


def test_requests_that_were_sent_together_are_all_answered(lasting: Served) -> None:
    sent = raw(CHAT, BODIES[CHAT] | {"max_tokens": 20}) * 2 + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    received = half_closed(lasting, sent)
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.endswith(b'"model":"checkpoint"}')


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", raw(CHAT, BODIES[CHAT])[:-5]], ids=["0", "head", "body"])
def test_a_client_that_closes_its_side_too_early_is_hung_up_on(lasting: Served, sent: bytes) -> None:
    assert not half_closed(lasting, sent).startswith(b"HTTP/1.1 200")
    assert lasting.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_noticed(lasting: Served, stream: bool) -> None:
    """On the wire this begins like closing one side."""

    def cancelled(count: float) -> bool:
        return lasting.metric("ifprune_jobs_cancelled_total") == count

    before = lasting.metric("ifprune_jobs_cancelled_total")
    with socket.create_connection(lasting.address, timeout=60) as connection:
        connection.sendall(raw(CHAT, BODIES[CHAT] | {"stream": stream}))
        eventually(lambda: lasting.metric("ifprune_jobs_running") == 1)
    eventually(partial(cancelled, before + 1))
    with socket.create_connection(lasting.address, timeout=60) as connection:
        connection.sendall(raw(CHAT, BODIES[CHAT] | {"stream": stream}))
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: lasting.metric("ifprune_jobs_running") == 1)
    eventually(partial(cancelled, before + 2))


@pytest.mark.parametrize(("concurrency", "queue"), [(1, 1), (2, 3), (4, 2)])
def test_as_many_answers_as_are_promised_are_given(
    checkpoint: Path, tmp_path: Path, concurrency: int, queue: int
) -> None:
    most = concurrency + queue
    body = ENDLESS | {"messages": HELLO, "max_tokens": 8}
    texts = ENDLESS | {"prompt": ["a"] * most, "max_tokens": 8}
    with serving(checkpoint, tmp_path, "--concurrency", str(concurrency), "--queue", str(queue)) as server:
        for _ in range(3):
            assert len(server.post(CHAT, body | {"n": most}).json()["choices"]) == most
            assert len(server.post(TEXT, texts).json()["choices"]) == most
        assert server.post(CHAT, body | {"n": most, "stream": True}).text.count('"finish_reason":"length"') == most
        exclusive = body | {"n": most, "ifprune": {"selector": "activation"}}  # one after the other
        assert len(server.post(CHAT, exclusive).json()["choices"]) == most
        with ThreadPoolExecutor(most) as pool:  # and to as many clients at once
            answers = list(pool.map(lambda _: server.post(CHAT, body).status_code, range(most)))
        assert answers == [200] * most
        refused = server.post(CHAT, body | {"n": most + 1})
        assert refused.status_code == 400
        assert f"at most {most} at once" in refused.json()["error"]["message"]
