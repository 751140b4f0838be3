"""`ifprune serve` as a command: how it begins, ends, and says what it cannot do."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import run
from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "checkpoint")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_listens_and_ends_on_a_signal(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(checkpoint, tmp_path, prelude="pass") as server:
        eventually(lambda: f"listens on {server.url}" in "".join(server.stderr))  # a thread of the tests reads it
        server.process.send_signal(number)
        assert server.process.wait(60) == 0


def test_an_answer_under_way_does_not_hold_up_the_end(checkpoint: Path, tmp_path: Path) -> None:
    body = b'{"prompt": "a", "max_tokens": 100000, "stream": true, "logit_bias": {"2": -100}}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(checkpoint, tmp_path, prelude="pass") as server, socket.create_connection(server.address) as client:
        client.sendall(head + body)
        assert client.recv(100)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0", "--port", "0"], ["--host 0.0.0.0", "API key"]),
        (["--host", "no.such.host.invalid"], ["--host no.such.host.invalid"]),
        (["--port", "0", "--api-key", " "], ["API key is empty"]),
        (["--port", "0", "--density", "2"], ["density 2"]),
        (["--port", "0", "--density", "0.5", "--dense"], ["--dense", "--density", "exclude"]),
        (["--port", "0", "--task", "nothing"], ["no task nothing"]),
        (["--port", "0", "--selector", "learned"], ["no trained predictor"]),
        (["--port", "0", "--prompt-cache-size", "lots"], ["--prompt-cache-size"]),
        (["--port", "0", "--temp", "-1"], ["temperature"]),
        (["--port", "0", "--alias", ""], ["--alias is empty"]),
    ],
)
def test_what_cannot_be_is_one_line(checkpoint: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    result = run("serve", "--model", checkpoint, *options, cache=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert all(word in line for word in words), line
    assert result.stdout == ""


def test_a_port_in_use_is_one_line(served: Served, checkpoint: Path, tmp_path: Path) -> None:
    port = str(served.address[1])
    result = run("serve", "--model", checkpoint, "--port", port, cache=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert f"port {port}" in line
    assert "in use" in line


def test_without_its_packages_it_says_what_to_install(checkpoint: Path, tmp_path: Path) -> None:
    absent = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *given: None if name == 'uvicorn' else find(name, *given)"
    )
    result = run("serve", "--model", checkpoint, "--port", "0", cache=tmp_path, prelude=absent)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "ifprune: error: uvicorn missing; install with: pip install 'ifprune-mlx[server]'"
    ]


def test_the_page_is_given_out_when_asked_for(served: Served, checkpoint: Path, tmp_path: Path) -> None:
    page = served.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name, kind in (
        ("page.js", "text/javascript"),
        ("page.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/markdown-it.umd.min.js", "text/javascript"),
        ("vendor/purify.min.js", "text/javascript"),
        ("vendor/highlight.min.js", "text/javascript"),
    ):
        assert name in page.text
        assert served.get(f"/{name}").headers["content-type"].startswith(kind)
    licences = served.get("/vendor/LICENSES.txt").text
    assert all(f"---- {name} ----" in licences for name in ("markdown-it", "highlight.js", "dompurify"))
    assert not re.search(r"(src|href)=\"?(https?:)?//", page.text)  # nothing comes from elsewhere
    with serving(checkpoint, tmp_path) as server:
        assert server.get("/").status_code == 404


@pytest.mark.parametrize(
    ("options", "address"),
    [((), None), (("--ui",), "127.0.0.1"), (("--host", "0.0.0.0", "--api-key", "k", "--ui"), "127.0.0.1")],
)
def test_the_start_line_says_where_the_chat_is(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], address: str | None
) -> None:
    with serving(checkpoint, tmp_path, *options) as server:
        eventually(lambda: "Ctrl-C" in "".join(server.stderr))
        [line] = [line for line in server.stderr if "Ctrl-C" in line]
        chat = "" if address is None else f", chat at http://{address}:{server.address[1]}/"
        assert line == f"checkpoint listens on {server.url} (clients: {server.url}/v1){chat}; Ctrl-C ends it\n"


def test_open_opens_the_chat_in_the_browser(checkpoint: Path, tmp_path: Path) -> None:
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n')
    browser.chmod(0o755)
    with serving(checkpoint, tmp_path, "--open", env={"BROWSER": f"{browser} %s"}) as server:
        eventually(lambda: opened.exists() and opened.read_text() != "")
        assert opened.read_text() == f"{server.url}/"
        assert "<title>ifprune</title>" in server.get("/").text


def test_open_without_a_browser_says_what_to_open(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, "--open", env={"BROWSER": "false %s", "PATH": "/nowhere"}) as server:
        eventually(lambda: f"no browser could be opened; open {server.url}/ yourself" in "".join(server.stderr))


def test_the_chat_template_can_be_ignored(checkpoint: Path, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 1}
    with serving(checkpoint, tmp_path, "--ignore-chat-template") as server:
        usage = server.post("/v1/chat/completions", body).json()["usage"]
        assert usage["prompt_tokens"] == len("Once upon")  # every byte is a token


def hello(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **fields}


def statuses(server: Served, model: str) -> list[int]:
    """How the endpoints that take a model's name answer."""
    answers = [server.post(path, hello(model)) for path in ("/v1/chat/completions", "/v1/messages")]
    answers.append(server.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1}))
    answers.append(server.post("/v1/messages/count_tokens", hello(model)))
    answers.append(server.get(f"/v1/models/{model}"))
    return [answer.status_code for answer in answers]


def test_aliases_are_names_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    names = ("gpt-4o", "claude-sonnet", "owner/name")
    options = [option for name in names for option in ("--alias", name)]
    with serving(checkpoint, tmp_path, *options) as server:
        for name in (*names, "checkpoint", "default", str(checkpoint)):
            assert statuses(server, name) == [200] * 5, name
        assert statuses(server, "gpt-4") == [404] * 5
        listed = server.get("/v1/models").json()
        assert [card["id"] for card in listed["data"]] == ["checkpoint", *names]
        assert (listed["first_id"], listed["last_id"]) == ("checkpoint", "owner/name")
        assert server.get("/v1/models/owner/name").json()["id"] == "owner/name"
        refused = server.post("/v1/chat/completions", hello("gpt-4")).json()["error"]
        assert refused["code"] == "model_not_found"
        assert all(name in refused["message"] for name in (*names, "checkpoint", "default", "--alias"))


def test_any_model_is_answered_if_told_so(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, "--any-model") as server:
        for name in ("gpt-4o", "claude-3-5-haiku-20241022", "a/b/c", "checkpoint"):
            assert statuses(server, name) == [200] * 5, name
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["checkpoint"]
