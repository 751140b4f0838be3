"""Telling thoughts from an answer, however the text is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.thinking import Reasoning, Thinking, ThinkingSplitter, ThoughtFinder, thinking_of
from tests.tiny import write_tokenizer

MARKED = Thinking("<think>", "</think>")
BEGUN = Thinking("<think>", "</think>", begun=True)
CHANNEL = Thinking("<|channel>thought", "<channel|>")
CASES = [
    (MARKED, "<think>\na b\n\nc\n</think>\n\nhi\n", "a b\n\nc", "hi\n"),
    (MARKED, " \n<think>a</think>hi", "a", "hi"),
    (MARKED, "<think>\n\n</think>\n\nhi", "", "hi"),
    (MARKED, "<think>a</think>\n<think>b</think>c", "ab", "c"),
    (MARKED, "hi <think> there </think>", "", "hi <think> there </think>"),
    (MARKED, "hi </think>", "", "hi </think>"),
    (MARKED, " \n hi", "", " \n hi"),
    (MARKED, "<thi", "", "<thi"),
    (MARKED, "<think>abc </thi", "abc </thi", ""),
    (MARKED, "<think>", "", ""),
    (MARKED, "", "", ""),
    (BEGUN, "a\n</think>\n\nhi", "a", "hi"),
    (BEGUN, "\n<think>a</think>hi <think>", "a", "hi <think>"),
    (BEGUN, "</think>hi", "", "hi"),
    (BEGUN, "never ends", "never ends", ""),
    (CHANNEL, "<|channel>thought\na<channel|>hi", "a", "hi"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(("thinking", "text", "thoughts", "answer"), CASES)
def test_however_it_is_cut(thinking: Thinking, text: str, thoughts: str, answer: str, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    splitter = ThinkingSplitter(thinking)
    parts = [part for piece in pieces for part in splitter.feed(piece)] + list(splitter.finish())
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == thoughts
    assert "".join(part for part in parts if isinstance(part, str)) == answer
    assert all(part.text if isinstance(part, Reasoning) else part for part in parts)
    finder = ThoughtFinder(thinking)
    found = [piece for given in pieces for piece in finder.feed(given)] + [finder.finish()]
    assert "".join(piece for _, piece in found) == text


@pytest.mark.parametrize(
    ("tokens", "template", "marks"),
    [
        (["<think>", "</think>"], None, ("<think>", "</think>")),
        (["<longcat_think>", "</longcat_think>"], None, ("<longcat_think>", "</longcat_think>")),
        (["<|channel>", "<channel|>"], None, ("<|channel>thought", "<channel|>")),
        ([], "[THINK] [/THINK]", ("[THINK]", "[/THINK]")),
        ([], "<think> </think>", ("<think>", "</think>")),
        ([], {"default": "", "tool_use": "<seed:think></seed:think>"}, ("<seed:think>", "</seed:think>")),
        ([], "thinks not", None),
    ],
)
def test_marks_of_real_tokenizers(
    tmp_path: Path, tokens: list[str], template: str | dict[str, str] | None, marks: tuple[str, str] | None
) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = (
        [{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template
    )
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    thinking = thinking_of(load_tokenizer(tmp_path))
    assert thinking == (None if marks is None else Thinking(*marks))
