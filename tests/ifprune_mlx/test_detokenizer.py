"""Text that comes token by token is the text of all tokens, for every kind of tokenizer."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ifprune_convert.readers.spm_tokenizer import write_spm_tokenizer
from ifprune_mlx import Model, stream_generate
from ifprune_mlx.detokenizer import Detokenizer, TokenTexts, bytes_of
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.request import Request, SamplingParams, SelectionParams
from tests.tiny import write_tokenizer
from tests.tiny_gguf import train_sentencepiece

KINDS = ("byte-level", "llama 2", "gemma", "word pieces", "metaspace")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerWrapper]:
    """One tokenizer of each kind: byte-level, SentencePiece with and without its space, and two others."""
    found = {}
    for kind in KINDS:
        source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("tokenizer")
        if kind == "byte-level":
            write_tokenizer(folder)
        elif kind in ("llama 2", "gemma"):
            model = train_sentencepiece(prefix=kind == "llama 2").serialized_model_proto()
            (source / "tokenizer.model").write_bytes(model)
            write_spm_tokenizer(source, folder)
        else:
            words = [
                "[UNK]",
                "the",
                "cat",
                "##s",
                ",",
                ".",
                "!",
                "n",
                "t",
                "\u2581a",
                "\u2581the",
                "b",
                "\u2581",
                "\ufffd",
            ]
            made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
            if kind == "word pieces":
                made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
            else:
                made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            made.save(str(folder / "tokenizer.json"))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found[kind] = load_tokenizer(folder)
    return found


def streamed(tokenizer: TokenizerWrapper, ids: list[int], context: tuple[int, ...] = ()) -> str:
    """The pieces of a streaming detokenizer, joined."""
    detokenizer = Detokenizer(tokenizer, context)
    text = ""
    for token in ids:
        detokenizer.add_token(token)
        text += detokenizer.last_segment
    detokenizer.finalize()
    return text + str(detokenizer.last_segment)


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_one_by_one_give_the_text_of_all(tokenizers: dict[str, TokenizerWrapper], kind: str) -> None:
    tokenizer, random = tokenizers[kind], np.random.default_rng(0)
    for _ in range(150):
        ids = random.integers(0, len(tokenizer), random.integers(1, 40)).tolist()
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "llama 2", "gemma"])
@pytest.mark.parametrize(
    "text",
    ["    return x", " a", "\n\n  b", "\0 \0", "東京 x", "été 👩‍🚀 текст", "\ufffd", "\t\tif x:\n\t\t\treturn", "Ġ Ā"],
)
def test_any_text_comes_back(tokenizers: dict[str, TokenizerWrapper], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["byte-level", "llama 2", "gemma", "metaspace"])
def test_a_raw_answer_keeps_the_space_of_its_first_word(tokenizers: dict[str, TokenizerWrapper], kind: str) -> None:
    tokenizer = tokenizers[kind]
    whole = tokenizer.encode("the the a", add_special_tokens=False)
    for cut in range(1, len(whole)):
        prompt, answer = whole[:cut], whole[cut:]
        assert tokenizer.decode(prompt) + streamed(tokenizer, answer, tuple(prompt)) == tokenizer.decode(whole)


def test_text_is_not_held_back_longer_than_a_character(tokenizers: dict[str, TokenizerWrapper]) -> None:
    tokenizer = tokenizers["byte-level"]
    detokenizer = Detokenizer(tokenizer)
    segments = []
    for token in tokenizer.encode("ab東c", add_special_tokens=False):
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
    assert segments == ["a", "b", "", "", "東", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_nothing_but_broken_characters_stays_quick(
    tokenizers: dict[str, TokenizerWrapper], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    vocabulary = tokenizer.get_vocab()
    broken = vocabulary.get("<0xFF>", vocabulary.get("ÿ", vocabulary.get("\ufffd")))
    assert streamed(tokenizer, [broken] * 500) == tokenizer.decode([broken] * 500)
    detokenizer = Detokenizer(tokenizer)
    for _ in range(500):
        detokenizer.add_token(broken)
    assert len(detokenizer._window) < 200


@pytest.mark.parametrize("text", ["    return x", " \0東"])
def test_generation_and_its_stream_give_the_text_that_decode_gives(
    tiny: tuple[Model, TokenizerWrapper], text: str
) -> None:
    model, tokenizer = tiny
    ids = tokenizer.encode(text, add_special_tokens=False)

    def forced(tokens: mx.array, logits: mx.array) -> mx.array:
        step = len(tokens) - prompt_length
        return mx.where(mx.arange(logits.shape[-1]) == (ids[step] if step < len(ids) else 2), 0.0, -1e9)[None]

    for prompt in ("def f(x):\n", [{"role": "user", "content": "code"}], tokenizer.encode("x =")):
        prompt_length = len(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
            if isinstance(prompt, list) and isinstance(prompt[0], dict)
            else tokenizer.encode(prompt)
            if isinstance(prompt, str)
            else prompt
        )
        responses = list(
            stream_generate(model, tokenizer, prompt, dense=True, max_tokens=30, logits_processors=[forced])
        )
        assert "".join(response.text for response in responses) == text


def processed(tokenizer: TokenizerWrapper, ids: list[int], *, continues: bool, top: int = 0) -> list[tuple[str, int]]:
    """(text, offset) of every token of an answer, as a client with log-probabilities gets them."""
    request = Request((0,), "", SelectionParams(selection=None), SamplingParams(), 100, (), top, continues)
    processor = OutputProcessor(request, tokenizer)
    values, tokens, text = mx.zeros((len(tokenizer),)), [], ""
    for at, token in enumerate(ids):
        new, ready = processor.add(token, values, "length" if at == len(ids) - 1 else None)
        tokens += ready
        text += new
    for token in tokens:
        begun = "" if token.text.startswith("bytes:") else token.text
        assert text[token.offset : token.offset + len(begun)] == begun
    assert b"".join(bytes_of(token.text) for token in tokens) == text.encode()
    return [(token.text, token.offset) for token in tokens]


@pytest.mark.parametrize("kind", ["byte-level", "llama 2", "gemma"])
@pytest.mark.parametrize("text", ["the the hen", "    return x", "東京 x", "é\0 👩‍🚀", "aaa text 12 123"])
@pytest.mark.parametrize("continues", [False, True])
def test_tokens_with_their_bytes_and_offsets_add_up_to_the_text(
    tokenizers: dict[str, TokenizerWrapper], kind: str, text: str, continues: bool
) -> None:
    tokenizer = tokenizers[kind]
    assert processed(tokenizer, tokenizer.encode(text, add_special_tokens=False), continues=continues)


def test_pieces_keep_their_spaces_and_parts_of_characters_their_bytes(tokenizers: dict[str, TokenizerWrapper]) -> None:
    llama, level = tokenizers["llama 2"], tokenizers["byte-level"]
    ids = llama.encode("the then", add_special_tokens=False)
    assert [text for text, _ in processed(llama, ids, continues=True)] == [" the", " then"]
    assert processed(llama, ids, continues=False) == [("the", 0), (" then", 3)]
    parts = processed(level, level.encode("x東", add_special_tokens=False), continues=True)
    assert parts == [("x", 0), ("bytes:\\xe6", 1), ("bytes:\\x9d", 1), ("bytes:\\xb1", 1)]
    texts = TokenTexts(llama)
    vocabulary = llama.get_vocab()
    assert texts.text(vocabulary["<0xE6>"]) == "bytes:\\xe6"
    assert texts.text(vocabulary["<0x0A>"]) == "\n"
