"""When the model fails: an error in the API's form, the reason in the log alone, and the next request is answered."""

from __future__ import annotations

import json
import os
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

HELLO: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 8,
    "ifprune": {"selector": "static"},
}
LONG = HELLO | {"max_tokens": 8000, "logit_bias": {"2": -100}, "stream": True}
REASON = "no memory is left"


def fails(module: str, name: str) -> str:
    """A prelude: while a file is there, nothing can be computed that needs `name`."""
    return (
        f"import os, {module} as at; whole = at.{name}; "
        f"fail = lambda: (_ for _ in ()).throw(RuntimeError('{REASON}')); "
        f"at.{name} = lambda *given: fail() if os.path.exists(os.environ['TROUBLE']) else whole(*given)"
    )


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make this file, and the model fails; remove it, and it works again."""
    return tmp_path_factory.mktemp("trouble") / "now"


@pytest.fixture(scope="module")
def frail(trouble: Path) -> Iterator[Served]:
    """A server whose model can be made to fail."""
    checkpoint = write_checkpoint(trouble.with_name("checkpoint"), max_position_embeddings=8192)
    with serving(
        checkpoint,
        trouble.parent,
        env={"TROUBLE": str(trouble)},
        prelude=fails("ifprune_mlx.serving.engine.decoder", "BatchDecoder.step"),
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def peace(trouble: Path) -> Iterator[None]:
    """Every test begins and ends without trouble."""
    yield
    trouble.unlink(missing_ok=True)


def said(server: Served, reason: str) -> bool:
    """Whether it is in the log."""
    return reason in "".join(server.stderr)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/chat/completions", "server_error"), ("/v1/messages", "api_error")],
    ids=["OpenAI", "Anthropic"],
)
def test_a_failure_is_a_500_or_an_event_and_the_next_request_is_answered(
    frail: Served, trouble: Path, path: str, kind: str, stream: bool
) -> None:
    body = HELLO | {"stream": stream}
    before = frail.post(path, HELLO).json()
    failed = frail.metric("ifprune_jobs_failed_total")
    trouble.touch()
    refused = frail.post(path, body)
    if stream:  # its headers came before
        assert refused.status_code == 200
        assert refused.headers["content-type"].startswith("text/event-stream")
        *_, last = [line for line in refused.text.splitlines() if line.startswith("data: ")]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "[DONE]" not in refused.text
        assert "message_stop" not in refused.text
    else:
        assert refused.status_code == 500
        assert refused.headers["content-type"] == "application/json"
        error = refused.json()["error"]
    assert error["type"] == kind
    assert REASON not in refused.text
    eventually(partial(said, frail, REASON))
    assert frail.metric("ifprune_jobs_failed_total") == failed + 1
    trouble.unlink()
    after = frail.post(path, HELLO).json()
    text = "choices" if "choices" in after else "content"
    assert after[text] == before[text]


def test_the_clients_raise_what_fails_before_the_first_token(frail: Served, trouble: Path) -> None:
    static = {"ifprune": HELLO["ifprune"]}
    options: dict[str, Any] = {"model": "default", "messages": HELLO["messages"], "max_tokens": 8, "extra_body": static}
    trouble.touch()
    with (
        openai.OpenAI(base_url=f"{frail.url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.create(stream=True, **options) as stream,
        pytest.raises(openai.APIError, match="its log says why"),
    ):
        list(stream)
    with (
        anthropic.Anthropic(base_url=frail.url, api_key="none", max_retries=0) as other,
        other.messages.stream(**options) as events,
        pytest.raises(anthropic.APIStatusError, match="its log says why"),
    ):
        events.get_final_message()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_failure_on_the_way_is_an_event_and_ends_the_stream(frail: Served, trouble: Path, path: str) -> None:
    with httpx.stream("POST", frail.url + path, json=LONG, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        begun = next(line for line in lines if '"delta"' in line)
        assert begun
        trouble.touch()
        rest = [line for line in lines if line]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["type"] == ("server_error" if "chat" in path else "api_error")
    assert "[DONE]" not in "".join(rest)
    assert "message_stop" not in "".join(rest)
    trouble.unlink()
    assert frail.post(path, HELLO).status_code == 200


def test_neurons_that_can_no_longer_be_read(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    first, second = ({"ifprune": {"selector": "static", "density": density}} for density in (0.25, 0.5))
    with serving(checkpoint, tmp_path, "--residency", "ssd") as server:

        def answer(fields: dict[str, Any]) -> Any:
            return server.chat("Hello", temperature=0, **fields)["choices"]

        expected = [answer(first), answer(second), answer(first)]
        file = min(checkpoint.glob("neurons-*"))
        content, times = file.read_bytes(), file.stat()
        with file.open("r+b") as opened:
            opened.truncate(100)
        refused = server.post("/v1/chat/completions", HELLO | second)
        assert refused.status_code == 500
        assert file.name not in refused.text
        eventually(partial(said, server, f"{file}: cannot be read"))
        with file.open("r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as it was; else it counts as another file
        assert [answer(second), answer(first)] == [expected[1], expected[0]]


def test_neurons_that_were_moved_half_way(trouble: Path, tmp_path: Path) -> None:
    """The model must be loaded again; that is no fault of those who ask."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    env, prelude = {"TROUBLE": str(trouble)}, fails("ifprune_mlx.sparse.slots", "exchange_rows")
    with serving(checkpoint, tmp_path, "--selector", "random", "--density", "0.5", env=env, prelude=prelude) as server:
        assert server.chat("one")["choices"]
        trouble.touch()
        for reason in (REASON, "cut off half way"):
            refused = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": reason}]})
            assert refused.status_code == 500
            assert refused.json()["error"]["type"] == "server_error"
            eventually(partial(said, server, reason))
            trouble.unlink(missing_ok=True)
