"""A client that stops reading its answer: the others are served, and it is let go of after a while."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ifprune_mlx.serving.http.serving import eventually, serving
from tests.tiny import write_checkpoint

_HASTE = "from ifprune_mlx.serving.http import server; server.STALLED_SECONDS = 1.0"
_READERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("stalled") / "checkpoint", max_position_embeddings=32768)


def test_a_stalled_reader_holds_up_nobody_and_is_let_go_of(checkpoint: Path, tmp_path: Path) -> None:
    # Each event is some kilobytes, so that what the system buffers is full soon.
    static = {"ifprune": {"selector": "static"}}
    options = static | {
        "max_tokens": 32000,
        "stream": True,
        "logit_bias": {"2": -100},
        "logprobs": True,
        "top_logprobs": 20,
    }
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], **options}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(checkpoint, tmp_path, prelude=_HASTE) as server, ExitStack() as stack:
        for _ in range(_READERS):
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(server.address)
            reader.sendall(head + body)
        eventually(lambda: server.metric("ifprune_jobs_running") == _READERS)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda text: server.chat(text, **static), ["Hello"] * 8))
        # Long before the answers would have ended.
        eventually(lambda: server.metric("ifprune_jobs_cancelled_total") == _READERS, 180)
        assert server.metric("ifprune_jobs_running") == 0
        assert server.chat("Hello", **static)["choices"]
