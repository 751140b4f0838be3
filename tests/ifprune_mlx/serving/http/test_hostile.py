"""Clients that mean no good, or are broken, on plain sockets: the server answers or hangs up, and goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.tiny import write_checkpoint

# The time limits are for people; here they are short. For what is sent on after a refusal there is time enough, as on
# a busy machine that may take a while.
_HASTE = "from ifprune_mlx.serving.http import middleware, server; "
_HASTE += "middleware.BODY_SECONDS = 0.7; server.HEADER_SECONDS = 0.7"
_SOON = 8  # seconds: less than the limits that are for people
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with an API key, room for few, and little patience."""
    folder = tmp_path_factory.mktemp("hasty")
    options = ("--concurrency", "1", "--queue", "2", "--max-tokens", "400", "--max-body", "1MB")
    with serving(
        write_checkpoint(folder / "checkpoint", max_position_embeddings=8192),
        folder / "cache",
        *options,
        env={"IFPRUNE_API_KEY": "s3cret"},
        prelude=_HASTE,
    ) as server:
        yield server


_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\n"
KEY = {"Authorization": "Bearer s3cret"}


def exchange(served: Served, sent: bytes) -> bytes:
    """Send all of it, then read until the server hangs up; it must do so in order, without a reset."""
    with socket.create_connection(served.address, timeout=60) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"HELLO\r\n\r\n",
        b"GET /health HTTP/x.1\r\nHost: localhost\r\n\r\n",
        b"GET / health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 3_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=[
        "TLS",
        "no HTTP",
        "version",
        "target",
        "no host",
        "two hosts",
        "header",
        "length",
        "lengths",
        "chunk",
        "long",
        "path",
    ],
)
def test_what_is_no_http_is_a_400(hasty: Served, sent: bytes) -> None:
    head, _, body = exchange(hasty, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["message"]
    assert hasty.get("/health").status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_slow_headers_are_cut_off(hasty: Served, sent: bytes) -> None:
    start = time.monotonic()
    assert exchange(hasty, sent).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start < _SOON


def test_headers_that_drip_on_a_used_connection_are_cut_off(hasty: Served) -> None:
    with socket.create_connection(hasty.address, timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        start, received = time.monotonic(), b""
        connection.settimeout(0.1)
        while not received:
            assert time.monotonic() - start < _SOON
            connection.sendall(b"G")
            with suppress(TimeoutError):
                received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 408")


def test_a_slow_body_is_cut_off(hasty: Served) -> None:
    assert exchange(hasty, _HEAD + b'Content-Length: 50\r\n\r\n{"prompt"').startswith(b"HTTP/1.1 408")


def test_a_huge_body_is_refused_before_it_is_read(hasty: Served) -> None:
    assert exchange(hasty, _HEAD + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413")
    chunk = b"%x\r\n" % 300_000 + b" " * 300_000 + b"\r\n"
    assert exchange(hasty, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("head", [_HEAD, _HEAD.replace(b"s3cret", b"wrong")], ids=["413", "401"])
def test_a_client_that_asks_to_close_hears_why_its_body_is_refused(hasty: Served, head: bytes) -> None:
    body = b" " * 20_000_000  # more than the system's buffers hold
    answer = exchange(hasty, head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 413" if head == _HEAD else b"HTTP/1.1 401")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize("length", [10, 99_999_999], ids=["401", "413"])
def test_refused_clients_that_go_on_keep_nobody_out(hasty: Served, length: int) -> None:
    head = _HEAD.replace(b"s3cret", b"wrong") if length == 10 else _HEAD
    with ExitStack() as stack:
        for _ in range(80):  # more than are let in at once
            connection = stack.enter_context(socket.create_connection(hasty.address, timeout=60))
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % length)
            assert connection.recv(12) == (b"HTTP/1.1 401" if length == 10 else b"HTTP/1.1 413")
        assert hasty.post("/v1/chat/completions", {**HELLO, "max_tokens": 1}, headers=KEY).status_code == 200


def test_a_client_that_hangs_up_early_leaves_no_trace(hasty: Served) -> None:
    for sent in (
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ):
        with socket.create_connection(hasty.address, timeout=60) as connection:
            connection.sendall(sent)
    assert hasty.get("/health").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic s3cret"},
        {"x-api-key": "S3CRET"},
        {"Authorization": "Bearer s3cret\u00e9"},
    ],
)
def test_the_key_is_needed(hasty: Served, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("utf-8") for name, value in headers.items()}
    for path, form in (("/v1/chat/completions", "error"), ("/v1/messages", "error"), ("/metrics", "error")):
        response = httpx.request("GET" if path == "/metrics" else "POST", hasty.url + path, headers=encoded)
        assert response.status_code == 401
        assert response.json()[form]["type"] == "authentication_error"
    assert hasty.get("/health").status_code == 200


def test_both_ways_to_send_the_key(hasty: Served) -> None:
    for headers in (KEY, {"x-api-key": "s3cret"}):
        assert hasty.get("/v1/models", headers=headers).status_code == 200


def test_too_many_at_once_are_told_to_wait(hasty: Served) -> None:
    def busy(running: int, waiting: int) -> bool:
        text = hasty.get("/metrics", headers=KEY).text
        return f"ifprune_jobs_running {running}.0\n" in text and f"ifprune_jobs_waiting {waiting}.0\n" in text

    body = json.dumps({**HELLO, "max_tokens": 8000, "logit_bias": {"2": -100}}).encode()
    head = _HEAD.replace(b"completions", b"chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body)
    with ExitStack() as stack:
        for running, waiting in ((1, 0), (1, 1), (1, 2)):
            stack.enter_context(socket.create_connection(hasty.address)).sendall(head + body)
            eventually(partial(busy, running, waiting))
        refused = hasty.post("/v1/chat/completions", HELLO, headers=KEY)
        assert refused.status_code == 429, refused.text
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
    eventually(partial(busy, 0, 0))
    assert hasty.post("/v1/chat/completions", {**HELLO, "max_tokens": 1}, headers=KEY).status_code == 200


def test_pages_of_a_named_origin_may_ask(tmp_path: Path) -> None:
    with serving(write_checkpoint(tmp_path / "checkpoint"), tmp_path, "--cors", "https://a.example") as server:
        headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        asked = httpx.options(server.url + "/v1/chat/completions", headers=headers)
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        response = server.post(
            "/v1/chat/completions", {**HELLO, "max_tokens": 1}, headers={"Origin": "https://a.example"}
        )
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = server.post("/v1/chat/completions", HELLO, headers={"Origin": "https://b.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers
