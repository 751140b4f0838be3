"""Tokenizers and chat templates of sources: found wherever they lie, and refused if they crash, hang or grow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from ifprune_convert import tokenizer_trial
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.predictor import open_predictor
from ifprune_convert.readers import open_source
from ifprune_mlx import PredictorError, SourceError, load
from tests.ifprune_mlx.test_tokenizer import ADDED, BEYOND, edit, padded
from tests.tiny import TEMPLATE, write_source, write_tokenizer
from tests.tiny_gguf import CONFIG, TOKENS, make_model, train_sentencepiece, write_gguf
from tests.tiny_predictor import write_predictor

CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "w"}}]
TOOL_TEMPLATE = "{{ tools|length }} tools{% for m in messages %}{{ m.content }}{% endfor %}"


def replace(text: str, content: str, times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": text}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


HOSTILE: dict[str, dict[str, Any]] = {
    "a letter doubles": {"normalizer": replace("q", "qq", 40)},
    "a word doubles": {"normalizer": replace("zebra", "zebrazebra", 40)},
    "a rare character doubles": {"normalizer": replace("\u0416", "\u0416\u0416", 40)},
    "nested repeats": {"pre_tokenizer": split("(x+x+)+y")},
    "alternatives": {"pre_tokenizer": split("(a|a)*$")},
    "no regular expression": {"pre_tokenizer": split("(")},
    "a damaged map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a map that crashes": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_that_hangs_grows_or_crashes_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_trial, "_SECONDS", 2)
    write_tokenizer(tmp_path)
    edit(tmp_path, lambda value: value.update(HOSTILE[kind]))
    start = time.monotonic()
    assert tokenizer_trial.try_tokenizer(tmp_path)
    assert time.monotonic() - start < 20


def test_memory_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    assert tokenizer_trial.try_tokenizer(tmp_path) is None
    # The child is a script, so a limit that any process exceeds is written into a copy of it.
    program = Path(tokenizer_trial.__file__).read_text()
    (tmp_path / "trial.py").write_text(program.replace("_MEMORY = 3 << 30", "_MEMORY = 1 << 20"))
    monkeypatch.setattr(tokenizer_trial, "__file__", str(tmp_path / "trial.py"))
    edit(tmp_path, lambda value: value.update(normalizer=replace("q", "qq", 40)))
    assert "memory" in str(tokenizer_trial.try_tokenizer(tmp_path))


def test_convert_refuses_them_in_a_source_and_in_a_predictor(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    edit(source, lambda value: value.update(HOSTILE["nested repeats"]))
    with pytest.raises(SourceError, match=f"{source}: its tokenizer cannot be loaded"):
        convert(open_source(source), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()
    predictor = edit(write_predictor(tmp_path / "predictor"), lambda value: value.update(HOSTILE["nested repeats"]))
    with pytest.raises(PredictorError, match=f"{predictor}: its tokenizer cannot be loaded"):
        open_predictor(predictor, (128, 128))


@pytest.mark.parametrize("charsmap", [b"\xff\xff\xff\xff\0\0\0\0", b"x", b"\x08\0\0\0abcdefgh", b"\x04\0\0\0\0\0\0\0"])
def test_a_sentencepiece_model_with_a_damaged_map_is_refused(tmp_path: Path, charsmap: bytes) -> None:
    source = write_source(tmp_path / "source", vocab_size=400)
    proto = sentencepiece_model_pb2.ModelProto.FromString(train_sentencepiece(prefix=True).serialized_model_proto())
    proto.normalizer_spec.precompiled_charsmap = charsmap
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(SourceError, match=f"{source}"):
        convert(open_source(source), tmp_path / "out", Options())


@pytest.mark.parametrize("kind", ADDED)
def test_an_added_token_without_an_embedding_is_said(tmp_path: Path, kind: str) -> None:
    """As in Gemma 3's text models, which are fine without it."""
    source, notes = padded(write_source(tmp_path / "source"), ADDED[kind]), list[str]()
    convert(open_source(source), tmp_path / "out", Options(), note=notes.append)
    assert any("has no embeddings for " in note for note in notes)


@pytest.mark.parametrize("kind", BEYOND)
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, kind: str) -> None:
    source = edit(write_source(tmp_path / "source"), BEYOND[kind])
    with pytest.raises(SourceError, match=f"{source}: the tokenizer .* embeddings for 320 tokens only"):
        convert(open_source(source), tmp_path / "out", Options())


HANGING = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [HANGING, "{{ 'a' * 3000000000 }}", "{{ '%3000000000d' % 1 }}"])
def test_a_template_that_hangs_or_grows_is_refused(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifprune_mlx.chat_sandbox._SECONDS", 0.3)
    source = write_source(tmp_path / "source")
    edit(source, lambda value: value.update(chat_template=template), "tokenizer_config.json")
    with pytest.raises(SourceError, match=f"{source}: the chat template"):
        convert(open_source(source), tmp_path / "out", Options())
    predictor = write_predictor(tmp_path / "predictor")
    edit(predictor, lambda value: value.update(chat_template=template), "tokenizer_config.json")
    with pytest.raises(PredictorError, match=f"{predictor}: .*chat template"):
        open_predictor(predictor, (128, 128))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if x %}", "{{ 'a'|nofilter }}"])
def test_a_template_that_refuses_every_chat_is_said(tmp_path: Path, template: str) -> None:
    source, notes = write_source(tmp_path / "source"), list[str]()
    edit(source, lambda value: value.update(chat_template=template), "tokenizer_config.json")
    convert(open_source(source), tmp_path / "out", Options(), note=notes.append)
    assert any("a chat cannot be rendered" in note for note in notes)


def put_json(source: Path) -> None:
    (source / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def put_jinja(source: Path) -> None:
    (source / "chat_template.jinja").write_text(TEMPLATE)


def put_list(source: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TOOL_TEMPLATE}]
    named += [{"name": "rag", "template": "rag"}]
    edit(source, lambda value: value.update(chat_template=named), "tokenizer_config.json")


def put_folder(source: Path) -> None:
    put_jinja(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE)
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")


def put_folder_and_settings(source: Path) -> None:
    put_folder(source)
    (source / "chat_template.jinja").unlink()
    edit(source, lambda value: value.update(chat_template=TEMPLATE), "tokenizer_config.json")


@pytest.mark.parametrize("put", [put_json, put_jinja, put_list, put_folder, put_folder_and_settings])
def test_chat_templates_are_used_wherever_they_lie(tmp_path: Path, put: Any) -> None:
    source, notes = write_source(tmp_path / "source"), list[str]()
    edit(source, lambda value: value.pop("chat_template"), "tokenizer_config.json")
    put(source)
    convert(open_source(source), tmp_path / "out", Options(), note=notes.append)
    model, tokenizer = load(tmp_path / "out")
    model.close()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    tools = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    named = put in (put_list, put_folder, put_folder_and_settings)
    assert tools == ("1 toolshi" if named else "<|im_start|>user\nhi<|im_end|>\n")
    assert any("left out: rag" in note for note in notes) is named


def test_a_name_alone_is_the_default(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    named = [{"name": "tool_use", "template": TEMPLATE}]
    edit(source, lambda value: value.update(chat_template=named), "tokenizer_config.json")
    convert(open_source(source), tmp_path / "out", Options())
    model, tokenizer = load(tmp_path / "out")
    model.close()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("value", [5, [5], [{"name": 1, "template": "x"}], {"default": None}])
def test_a_chat_template_of_another_kind_is_refused(tmp_path: Path, value: Any) -> None:
    source = write_source(tmp_path / "source")
    edit(source, lambda settings: settings.update(chat_template=value), "tokenizer_config.json")
    with pytest.raises(SourceError, match=r"tokenizer_config\.json"):
        convert(open_source(source), tmp_path / "out", Options())


# GGUF files.

CONFIG_OF = CONFIG | {"model_type": "llama"}


def gguf(path: Path, ends: list[str], **keys: Any) -> Path:
    """A GGUF file whose vocabulary has these tokens too; a key that is None is not in the file."""

    def change(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        tokens = [token for token in TOKENS if token not in ("<|endoftext|>", "<|im_end|>")] + ends
        values["tokenizer.ggml.tokens"] = tokens
        values["tokenizer.ggml.token_type"] = [3, 4] + [1] * (len(tokens) - 2)
        values["tokenizer.ggml.bos_token_id"] = 0
        for role in ("eos", "unknown", "padding"):
            values[f"tokenizer.ggml.{role}_token_id"] = None
        values |= {key.replace("__", "."): value for key, value in keys.items()}
        for key in [key for key, value in values.items() if value is None]:
            del values[key]

    config = CONFIG_OF | {"vocab_size": len(TOKENS) - 2 + len(ends)}
    return write_gguf(path, config, make_model(config), edit=change)


FIRST = len(TOKENS) - 2


@pytest.mark.parametrize(
    ("ends", "keys", "expected"),
    [
        (["<|eot_id|>"], {}, {0}),
        (["<|im_end|>", "<|endoftext|>"], {}, {0, 1}),
        (["<|end|>", "<|end_of_text|>", "<|eom_id|>"], {}, {0, 1, 2}),
        (["<|im_end|>", "x1"], {"tokenizer__ggml__eos_token_id": FIRST + 1}, {0, 1}),
        (["x1", "<|eot_id|>", "x2"], {"tokenizer__ggml__eot_token_id": FIRST}, {0, 1}),
        (["x1", "</s>"], {"tokenizer__ggml__eom_token_id": FIRST}, {0, 1}),
        (["<|return|>", "<|call|>", "<|end|>"], {}, {0, 1}),
        (["<|end|>", "<|return|>"], {}, {0, 1}),
        (["<end_of_turn>", "<eos>", "<|fim_pad|>", "<|file_sep|>"], {}, {0, 1, 2, 3}),
        (["<end_of_turn>", "</s>"], {}, {0}),
        (["x1", "x2"], {}, set()),
    ],
)
def test_answers_end_where_llama_cpp_ends_them(
    tmp_path: Path, ends: list[str], keys: dict[str, Any], expected: set[int]
) -> None:
    convert(open_source(gguf(tmp_path / "m.gguf", ends, **keys)), tmp_path / "out", Options())
    model, tokenizer = load(tmp_path / "out")
    model.close()
    assert tokenizer.eos_token_ids == {FIRST + at for at in expected}
    # A template's end of turn is that token, though the file has it for plain text.
    for at in expected:
        if not ends[at].startswith("x"):
            assert tokenizer.encode(f"a{ends[at]}b", add_special_tokens=False)[1:-1] == [FIRST + at]


@pytest.mark.parametrize("key", ["padding_token_id", "unknown_token_id"])
@pytest.mark.parametrize("number", [10_000, 0xFFFFFFFF])
def test_ids_of_tokens_that_a_gguf_can_do_without_may_be_none(tmp_path: Path, key: str, number: int) -> None:
    path = gguf(tmp_path / "m.gguf", ["<|im_end|>"], **{f"tokenizer__ggml__{key}": number})
    convert(open_source(path), tmp_path / "out", Options())
    model, tokenizer = load(tmp_path / "out")
    model.close()
    assert tokenizer.eos_token_ids == {FIRST}


def test_named_templates_of_a_gguf_are_used(tmp_path: Path) -> None:
    keys = {"tokenizer__chat_template__tool_use": TOOL_TEMPLATE, "tokenizer__chat_template__rag": "rag"}
    notes: list[str] = []
    source = open_source(
        gguf(tmp_path / "m.gguf", ["<|im_end|>"], **keys, tokenizer__chat_templates=["tool_use", "rag"])
    )
    convert(source, tmp_path / "out", Options(), note=notes.append)
    model, tokenizer = load(tmp_path / "out")
    model.close()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False) == "1 toolshi"
    assert any("left out: rag" in note for note in notes)
