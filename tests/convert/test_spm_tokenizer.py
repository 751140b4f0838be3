"""Folders with a SentencePiece model only: real models, trained here, against the `sentencepiece` library."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_convert.readers.spm_tokenizer import write_spm_tokenizer
from ifprune_mlx import load
from ifprune_mlx.errors import SourceError
from tests.tiny import write_source

CHATS = Path(str(files("ifprune_convert"))) / "data" / "calibration.jsonl"
PIECES = 600
MULTILINGUAL = [
    "Grüße aus Köln, ça va très bien, señor?", "Привет, как дела? Всё хорошо.", "日本語のテキスト と 空白",
    "안녕하세요 여러분", "مرحبا بالعالم", "नमस्ते दुनिया", "שלום עולם", "emoji 🦊👩‍🚀 here\n\nnew\tline\r\n",
    "def f(x):\n    return x**2  # 12345.678", "  two  spaces ", " leading", "trailing ", "", " ", "    ", "x\u2581y",
    "e\u0301 and \u00e9, ﬁ ① \uff26\uff55\uff4c\uff4c ½", "\u200bzero width", "Hello world", "ελληνικά", "ไทย",
    "a" * 300,
]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "bpe without bytes": {"model_type": "bpe"},
    "unigram that normalizes": {
        "model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True,
    },
    "bpe without prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
}  # fmt: skip
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def lines() -> list[str]:
    chats = [json.loads(line)["messages"] for line in CHATS.read_text(encoding="utf-8").splitlines()]
    return [line for chat in chats for turn in chat for line in turn["content"].splitlines()] + MULTILINGUAL


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a model of every kind, as llama's trainers set them but for what the kind says."""
    text = [line for line in lines() for line in [line.strip()] if line] + MULTILINGUAL[:8] * 4
    found: dict[str, Path] = {}
    for kind, options in KINDS.items():
        folder = found[kind] = tmp_path_factory.mktemp("spm")
        fixed = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=PIECES,
            character_coverage=0.98,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            minloglevel=2,
            **(fixed | options),
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    return found


@pytest.fixture
def bpe(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the BPE model's folder, to be changed."""
    return Path(shutil.copytree(models["bpe"], tmp_path / "source"))


def written(source: Path, tmp_path: Path) -> Tokenizer:
    (tmp_path / "out").mkdir(exist_ok=True)
    write_spm_tokenizer(source, tmp_path / "out")
    return Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_sentencepiece(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", vocab_size=PIECES)
    (folder / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(models[kind] / name, folder / name)
    convert(open_source(folder), tmp_path / "out", Options())
    model, tokenizer = load(tmp_path / "out")
    model.close()
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    other = 0
    for text in lines():
        ids, wanted = tokenizer.encode(text, add_special_tokens=False), reference.encode(text)
        if ids != wanted:
            # Of two ways to cut a text that score the same, the two libraries may take different ones.
            assert "unigram" in kind, text
            assert sum(map(reference.get_score, ids)) == pytest.approx(sum(map(reference.get_score, wanted))), text
            other += 1
        assert tokenizer.decode(ids, skip_special_tokens=False) == decoded(reference, ids), text
    assert other <= 3
    assert tokenizer.encode("hi") == [reference.bos_id(), *reference.encode("hi")]
    assert tokenizer.eos_token_ids == {reference.eos_id()}
    stream = tokenizer.detokenizer
    for token in reference.encode("Hello, world"):
        stream.add_token(token)
    stream.finalize()
    assert stream.text == "Hello, world"


def decoded(reference: Any, ids: list[int]) -> str:
    """SentencePiece's text; it writes an unknown piece as a sign of its own, Hugging Face by its name."""
    return str(reference.decode(ids)).replace(" \u2047 ", "<unk>")


def test_special_and_added_tokens(bpe: Path, tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(bpe / "tokenizer.model"))
    (bpe / "added_tokens.json").write_text(json.dumps({"<|end|>": PIECES + 1, "<|user|>": PIECES}))
    odd = {"content": "<s>", "normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    settings = LLAMA | {"added_tokens_decoder": {"1": odd | {"special": True}}, "legacy": True, "bos_token": odd}
    (bpe / "tokenizer_config.json").write_text(json.dumps(settings | {"add_eos_token": True}))
    (bpe / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>", "bos_token": odd}))
    tokenizer = written(bpe, tmp_path)
    hello = reference.encode("hello")
    assert tokenizer.encode("<|user|>hello<|end|>").ids == [1, PIECES, *hello, PIECES + 1, 2]
    assert tokenizer.encode("hello<s>hello", add_special_tokens=False).ids == [*hello, 1, *hello]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["bos_token"] == "<s>"
    assert config["pad_token"] == "</s>"
    assert not {"legacy", "added_tokens_decoder"} & config.keys()

    (bpe / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False, "add_bos_token": False}))
    tokenizer = written(bpe, tmp_path)
    assert tokenizer.encode("<|user|> hello").ids == [PIECES, *hello]
    assert tokenizer.encode("<|user|>hello").ids[1:] != hello
    assert tokenizer.encode("hello").ids == hello


def test_without_settings_the_model_names_its_special_tokens(bpe: Path, tmp_path: Path) -> None:
    (bpe / "tokenizer_config.json").unlink()
    assert written(bpe, tmp_path).encode("").ids == [1]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert [config[f"{role}_token"] for role in ("bos", "eos", "unk")] == ["<s>", "</s>", "<unk>"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is not a SentencePiece model; download the model's tokenizer.json"),
        ("tokenizer.model", b"", "is not a SentencePiece model"),
        ("added_tokens.json", b'{"<x>": 9000}', "should have the id 9000, and the model gives it 600"),
        ("added_tokens.json", b'{"<x>": "y"}', "cannot be made a tokenizer"),
        ("added_tokens.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b"{", "is not a JSON object"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 3}', "cannot be made a tokenizer"),
    ],
)
def test_damaged_files(bpe: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (bpe / name).write_bytes(content)
    with pytest.raises(SourceError, match=words) as caught:
        written(bpe, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(bpe))


@pytest.mark.parametrize("options", [{"model_type": "word"}, {"treat_whitespace_as_suffix": True}])
def test_kinds_that_are_not_supported(tmp_path: Path, options: dict[str, Any]) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        minloglevel=2,
        **({"vocab_size": 20, "hard_vocab_limit": False, "model_type": "bpe"} | options),
    )
    with pytest.raises(SourceError, match=r"not supported; download the model's tokenizer\.json"):
        written(tmp_path, tmp_path)
