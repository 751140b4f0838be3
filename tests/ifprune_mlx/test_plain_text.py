"""A model without a chat template, or told to ignore it, reads messages as plain text: nothing is made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import History, Session, load
from ifprune_mlx.chat_template import encode_prompt, plain_text, render_messages, without_template
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer, Conversation, Tools
from ifprune_mlx.serving.http.errors import RequestError
from tests.cli.process import run_here
from tests.ifprune_mlx.generating import A, Tiny, answer
from tests.tiny import write_source

TEXT = "The capital of France is"
ASK = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    source = write_source(folder / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(open_source(source), folder / "checkpoint", Options())
    return folder / "checkpoint"


@pytest.fixture(params=["base", "ignored"])
def plain(request: pytest.FixtureRequest, base_checkpoint: Path, tiny_checkpoint: Path) -> Iterator[Tiny]:
    """A model whose messages are plain text: it has no template, or its template is to be ignored."""
    model, tokenizer = load(base_checkpoint if request.param == "base" else tiny_checkpoint)
    yield model, tokenizer if request.param == "base" else without_template(tokenizer)
    model.close()


def test_one_message_is_read_as_it_is(plain: Tiny) -> None:
    wanted = list(plain[1].encode(TEXT))
    assert render_messages(plain[1], ASK) == encode_prompt(plain[1], ASK) == wanted
    (prompt,) = ChatRenderer(*plain).conversation(Conversation(ASK))
    assert list(prompt.tokens) == wanted
    history = History.empty(plain[0])
    answer(plain, ASK, selection=A, max_tokens=1, prompt_cache=history)
    assert history.tokens[:-1] == wanted
    chat = Session(*plain, selection=A)
    chat.ask(TEXT, max_tokens=1)
    assert chat.history.tokens[:-1] == wanted


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ([" Paris"], f"{TEXT} Paris\nAnd of Italy?"),
        (["\nParis"], f"{TEXT}\nParis\nAnd of Italy?"),
        (["Paris"], f"{TEXT}\nParis\nAnd of Italy?"),
    ],
)
def test_a_conversation_is_the_text_that_was_read_and_written(plain: Tiny, answers: list[str], wanted: str) -> None:
    messages = [*ASK, *({"role": "assistant", "content": text} for text in answers)]
    messages.append({"role": "user", "content": "And of Italy?"})
    assert plain_text(plain[1], messages) == wanted
    (prompt,) = ChatRenderer(*plain).conversation(Conversation(messages))
    assert plain[1].decode(list(prompt.tokens)).endswith(wanted)


def test_a_base_model_says_it_once(base_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    render_messages.__globals__["_say_plain"].cache_clear()
    with caplog.at_level(logging.WARNING, "ifprune_mlx"):
        for _ in range(2):
            model, tokenizer = load(base_checkpoint)
            for _ in range(2):
                answer((model, tokenizer), ASK, selection=A, max_tokens=1)
            ChatRenderer(model, tokenizer).conversation(Conversation(ASK))
    (record,) = caplog.records
    assert record.name == "ifprune_mlx.chat_template"
    assert "has no chat template" in record.getMessage()


def test_what_was_asked_for_is_not_said(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    plain = without_template(tiny[1])
    with caplog.at_level(logging.DEBUG, "ifprune_mlx"):
        render_messages(plain, ASK)
    assert caplog.records == []
    assert tiny[1].has_chat_template  # the given tokenizer is as it was
    assert render_messages(tiny[1], ASK) != render_messages(plain, ASK)


def test_tools_need_the_template(tiny: Tiny) -> None:
    tools = Tools([{"type": "function", "function": {"name": "look", "parameters": {}}}])
    with pytest.raises(RequestError, match="no tools"):
        ChatRenderer(tiny[0], without_template(tiny[1])).conversation(Conversation(ASK, tools))


@pytest.mark.parametrize("ignored", [True, False])
def test_chat_ignores_the_template_if_it_is_told_to(tiny_checkpoint: Path, ignored: bool) -> None:
    options: list[Any] = ["--ignore-chat-template"] if ignored else []
    done = run_here("chat", "--model", tiny_checkpoint, "-m", "4", *options, stdin=TEXT.encode() + b"\n/stats")
    assert done.returncode == 0, done.stderr
    _, tokenizer = load(tiny_checkpoint)
    count = len(render_messages(without_template(tokenizer) if ignored else tokenizer, ASK))
    assert f" of {count} tokens read anew" in done.stderr


def test_generate_reads_a_base_model_as_without_template(base_checkpoint: Path) -> None:
    arguments = ["generate", "--model", base_checkpoint, "-m", "6", "--prompt", TEXT, "--json"]
    said = [json.loads(run_here(*arguments, *more).stdout) for more in ([], ["--ignore-chat-template"])]
    assert said[0]["text"] == said[1]["text"]
    assert said[0]["prompt_tokens"] == said[1]["prompt_tokens"]
