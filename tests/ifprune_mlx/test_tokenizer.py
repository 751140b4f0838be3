"""What a model folder's tokenizer may do: nothing that crashes, reads beyond the embeddings, or hangs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer as lm_load_tokenizer

from ifprune_mlx import (
    CheckpointError,
    Model,
    PredictorError,
    PromptError,
    Session,
    SparsityPredictor,
    load,
    stream_generate,
)
from ifprune_mlx import tokenizer as module
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.errors import SourceError
from ifprune_mlx.serving.engine.engine import check_request
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer, Conversation
from ifprune_mlx.tokenizer import encode_text, load_tokenizer
from tests.cli.process import run_here
from tests.ifprune_mlx.serving.engine.engines import make_request
from tests.tiny import VOCABULARY, add_tokens, write_tokenizer
from tests.tiny_predictor import write_predictor

Edit = Callable[[dict[str, Any]], None]


def edit(folder: Path, change: Edit, name: str = "tokenizer.json") -> Path:
    """Change one of a folder's JSON files."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


def padded(folder: Path, number: int) -> Path:
    """Add a token that the model has no embedding for, as fine-tuners do for padding, and those before it."""
    first = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    add_tokens(folder, [*(f"<reserved {at}>" for at in range(first, number)), "[PAD]"], special=True)
    return folder


def in_vocabulary(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["the"] = 5000


def around_texts(tokenizer: dict[str, Any]) -> None:
    pieces: list[Any] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [70_000], "tokens": ["<s>"]}},
    }  # fmt: skip


ADDED = {"the next": VOCABULARY, "far": VOCABULARY + 300}
BEYOND: dict[str, Edit] = {"a word": in_vocabulary, "around": around_texts}


@pytest.mark.parametrize("kind", BEYOND)
def test_a_checkpoint_whose_tokenizer_has_more_tokens_than_the_model_does_not_load(
    tiny_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    folder = edit(Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")), BEYOND[kind])
    write_manifest(folder, source="test", licence=None)
    with pytest.raises(CheckpointError, match=f"embeddings for {VOCABULARY} tokens only"):
        load(folder)
    for command in ("generate", "select"):
        done = run_here(command, "--model", folder, "--prompt", "[PAD]the")
        assert done.returncode == 1
        assert "embeddings" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ADDED)
def test_an_added_token_that_the_model_has_not_is_refused_where_it_is_used(
    tiny_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    """Of the model's tokenizer and of a predictor's own; other prompts are answered."""
    folder = padded(Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")), ADDED[kind])
    write_manifest(folder, source="test", licence=None)
    for command in ("generate", "select"):
        assert run_here(command, "--model", folder, "--prompt", "the").returncode == 0
        done = run_here(command, "--model", folder, "--prompt", "[PAD]the")
        assert done.returncode == 1
        assert "token id" in done.stderr
        assert "Traceback" not in done.stderr
    predictor = SparsityPredictor.load(padded(write_predictor(tmp_path / "predictor"), ADDED[kind]))
    predictor.scores("the")
    with pytest.raises(PredictorError, match="embeddings for"):
        predictor.scores("[PAD]the")


@pytest.mark.parametrize("kind", BEYOND)
def test_neither_does_a_predictor(tmp_path: Path, kind: str) -> None:
    with pytest.raises(PredictorError, match="embeddings for"):
        SparsityPredictor.load(edit(write_predictor(tmp_path / "predictor"), BEYOND[kind]))


def test_the_last_embedding_may_be_used(tmp_path: Path) -> None:
    SparsityPredictor.load(padded(write_predictor(tmp_path / "predictor"), VOCABULARY - 1))


@pytest.mark.parametrize("wrong", [[VOCABULARY], [5, 10**6], [-1], [2**40], [5, -(2**70)]])
def test_ids_that_the_model_has_not_are_refused(tiny: tuple[Model, Any], wrong: list[int]) -> None:
    model, tokenizer = tiny
    for selector in ("activation", "static", None):
        with pytest.raises(PromptError, match=f"ids from 0 to {VOCABULARY - 1}"):
            list(stream_generate(model, tokenizer, wrong, selector=selector))
    with pytest.raises(PromptError, match="ids from 0 to"):
        check_request(model, make_request(tuple(wrong)))
    with pytest.raises(PromptError, match="ids from 0 to"):
        ChatRenderer(model, tokenizer).prompts([wrong])


def test_another_models_tokenizer_is_found_out(tiny: tuple[Model, Any], tmp_path: Path) -> None:
    model, _ = tiny
    write_tokenizer(tmp_path)
    other = lm_load_tokenizer(padded(tmp_path, VOCABULARY + 9))
    with pytest.raises(PromptError, match="own tokenizer"):
        list(stream_generate(model, other, "x [PAD]"))
    with pytest.raises(PromptError, match="own tokenizer"):
        Session(model, other).ask("x [PAD]")
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    predictor.tokenizer = other
    with pytest.raises(PredictorError, match="embeddings for"):
        predictor.scores("x [PAD]")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "x" * 50 + "\ud83d"])
def test_half_characters_are_refused_wherever_text_comes_in(tiny: tuple[Model, Any], tmp_path: Path, text: str) -> None:
    model, tokenizer = tiny
    chat = [{"role": "user", "content": text}]
    renderer = ChatRenderer(model, tokenizer)
    asks: list[Callable[[], object]] = [
        lambda: list(stream_generate(model, tokenizer, text)),
        lambda: list(stream_generate(model, tokenizer, chat)),
        lambda: Session(model, tokenizer).ask(text),
        lambda: Session(model, tokenizer, system_prompt=text).ask("x"),
        lambda: renderer.prompts([text]),
        lambda: renderer.conversation(Conversation(chat)),
    ]
    for ask in asks:
        with pytest.raises(PromptError, match="half a character"):
            ask()
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    with pytest.raises(PredictorError, match="half a character"):
        predictor.scores(text)


PANIC: dict[str, Any] = {
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
}


def test_a_panic_of_the_tokenizers_code_is_an_error_of_the_prompt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(edit(tmp_path, lambda value: value.update(PANIC)), SourceError, "x")
    assert encode_text(tokenizer, "hello")
    with pytest.raises(PromptError, match="the tokenizer fails on this text"):
        encode_text(tokenizer, "x" * 60)


def test_a_panic_while_loading_is_one_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    broken = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    with pytest.raises(SourceError, match=f"{tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(edit(tmp_path, lambda value: value.update(broken)), SourceError, "x")


def test_a_text_that_explodes_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    steps = [{"type": "Replace", "pattern": {"String": "q"}, "content": "qq"}] * 19
    grows = {"normalizer": {"type": "Sequence", "normalizers": steps}}
    tokenizer = load_tokenizer(edit(tmp_path, lambda value: value.update(grows)), SourceError, "x")
    monkeypatch.setattr(module, "_SECONDS", 0.05)
    start = time.monotonic()
    with pytest.raises(PromptError, match="takes more than"):
        encode_text(tokenizer, "q")
    assert time.monotonic() - start < 20
    assert encode_text(tokenizer, "the others go on")


BROKEN = {
    "no jinja": "{% if x %}",
    "refuses": "{{ raise_exception('never') }}",
    "undefined": "{{ messages[0].nothing.more }}",
    "hangs": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "grows": "{{ 'a' * 3000000000 }}",
    "number": "{{ 9 ** 9 ** 99 }}",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_predictors_broken_template_is_one_line(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_mlx.chat_sandbox._SECONDS", 0.3)
    folder = write_predictor(tmp_path / "predictor")
    edit(folder, lambda value: value.update(chat_template=BROKEN[kind]), "tokenizer_config.json")
    with pytest.raises(PredictorError) as info:
        SparsityPredictor.load(folder).scores("Hello")
    assert "template" in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("decoder", ["llama", "gemma", "none"])
def test_a_vocabulary_of_bytes_is_decoded_so_whatever_the_files_name(tmp_path: Path, decoder: str) -> None:
    write_tokenizer(tmp_path)
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    wrong = None if decoder == "none" else {"type": "Sequence", "decoders": steps[: 4 if decoder == "llama" else 3]}
    edit(tmp_path, lambda value: value.update(decoder=wrong))
    tokenizer = load_tokenizer(tmp_path, SourceError, "x")
    for text in (" a b\n", "\u6771\u4eac \u00e9", "\0"):
        assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_named_templates_are_used(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tools = "{% for m in messages %}{{ m.content }}{% endfor %}<tool_call>{{ tool_call.name if tool_call }}"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": tools}]
    edit(tmp_path, lambda value: value.update(chat_template=named), "tokenizer_config.json")
    tokenizer = load_tokenizer(tmp_path, SourceError, "x")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(chat, tools=[{"x": 1}], tokenize=False) == "hi<tool_call>"
    assert tokenizer.has_tool_calling
    assert tokenizer.has_chat_template


def test_ids_are_those_of_mlx_lm(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    ours, theirs = load_tokenizer(tmp_path, SourceError, "x", eos_token_ids=[0]), lm_load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "hi <|im_end|> \u00e9"}, {"role": "assistant", "content": "x"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.eos_token_ids == {0, 2}
    random = np.random.default_rng(0)
    for text in ("".join(map(chr, random.integers(0, 0x3000, 20))) for _ in range(50)):
        assert encode_text(ours, text) == theirs.encode(text)
