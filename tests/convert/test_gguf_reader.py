"""The GGUF reader: files that the `gguf` package writes, read back against the mlx-lm models they came from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import _get_classes

from ifprune_convert.readers import gguf as reader
from ifprune_convert.readers import open_source
from ifprune_mlx.errors import SourceError
from tests.gguf_blocks import SCALES, decode_block
from tests.tiny_gguf import CONFIG, TOKENS, make_model, sentencepiece_metadata, train_sentencepiece, write_gguf

TEXTS = [
    "def f(x):\n\treturn x ** 2  # été",
    "naïve 東京 😀👩‍👩‍👧 ½",
    "In 2024, 12345 people\r\n\r\n  paid €3.50!",
    " don't we'll ",
]


# The last setting differs from the width of a head in the 27B models only, which the number of layers gives away.
GEMMA2 = {
    "model_type": "gemma2", "head_dim": 32, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 32,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 3, "sliding_window_pattern": 2,
    "rope_local_base_freq": 500.0, "query_pre_attn_scalar": 32,
}  # fmt: skip


def rebuild(source: Any) -> Any:
    model_class, args_class = _get_classes(source.config)
    model = model_class(args_class.from_dict(source.config))
    weights = {name: source.take(name) for name in source.shapes}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.fixture
def llama() -> tuple[dict[str, Any], Any]:
    config = {"model_type": "llama", **CONFIG}
    return config, make_model(config)


@pytest.mark.parametrize(
    "extra",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "head_dim": 32},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": False},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "gemma", "head_dim": 32},
        GEMMA2,
        {**GEMMA2, "num_hidden_layers": 46, "query_pre_attn_scalar": 16},
        GEMMA3,
        {**GEMMA3, "tie_word_embeddings": False},
        {**GEMMA3, "num_hidden_layers": 62, "query_pre_attn_scalar": 16},
    ],
    ids=lambda extra: "-".join(map(str, extra.values())),
)
def test_logits_of_the_rebuilt_model_are_the_original_ones(tmp_path: Path, extra: dict[str, Any]) -> None:
    config = {**CONFIG, **extra}
    model = make_model(config)
    source = open_source(write_gguf(tmp_path / "m.gguf", config, model))
    assert source.licence == "apache-2.0"
    assert source.config["rms_norm_eps"] == 1e-05
    assert {name: source.config[name] for name in config} == config
    assert (source.config["bos_token_id"], source.config["eos_token_id"]) == (1, [2, 0])
    shapes = {name: tuple(p.shape) for name, p in tree_flatten(model.parameters())}
    assert source.shapes == shapes
    tokens = mx.array([[5, 9, 200, 31, 77, 4, 120]])
    expected, found = model(tokens), rebuild(source)(tokens)
    assert mx.abs(expected).max() > 0.1
    assert mx.abs(expected - found).max() < 1e-5


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 25])
def test_quantized_tensors_are_dequantized_exactly(
    tmp_path: Path, llama: tuple[dict[str, Any], Any], kind: Kind, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = llama
    monkeypatch.setattr(reader, "_CHUNK_BYTES", chunk_bytes)
    source = open_source(write_gguf(tmp_path / "m.gguf", config, model, kind=kind))
    for name, parameter in tree_flatten(model.parameters()):
        taken = source.take(name)
        value = np.array(parameter)
        assert taken.dtype == mx.float32
        expected = dequantize(quantize(value, kind), kind) if value.ndim > 1 else value
        assert np.array_equal(np.array(taken), expected), name


@pytest.mark.parametrize("kind", SCALES)
def test_every_quantized_type_is_what_its_definition_says(tmp_path: Path, kind: Kind) -> None:
    config = {**CONFIG, "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    dice = np.random.default_rng(0)
    raw = dice.integers(0, 256, (32, 256 // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        raw[..., at : at + 2] = dice.normal(0, 1e-2, (*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)

    def edit(values: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
        tensors["blk.0.ffn_up.weight"] = (raw.reshape(32, -1), kind)

    path = write_gguf(tmp_path / "m.gguf", config, make_model(config), edit=edit)
    taken = np.array(open_source(path).take("model.layers.0.mlp.up_proj.weight"))
    expected = np.array([[x for part in row for x in decode_block(bytes(part), kind)] for row in raw])
    assert taken.shape == expected.shape
    np.testing.assert_allclose(taken, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, mx.float16), (Kind.BF16, mx.bfloat16)])
def test_half_precision_stays_as_it_is(
    tmp_path: Path, llama: tuple[dict[str, Any], Any], kind: Kind, dtype: Any
) -> None:
    config, model = llama
    source = open_source(write_gguf(tmp_path / "m.gguf", config, model, kind=kind))
    for name, parameter in tree_flatten(model.parameters()):
        taken = source.take(name)
        assert taken.dtype == (dtype if parameter.ndim > 1 else mx.float32)
        assert mx.array_equal(taken, parameter.astype(taken.dtype)), name


def test_large_tensors_cost_little_more_than_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "model_type": "llama", "intermediate_size": 8192, "num_hidden_layers": 1}
    path = write_gguf(tmp_path / "m.gguf", config, make_model(config), kind=Kind.Q8_0)
    source = open_source(path)
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 1 << 16)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    taken = source.take("model.layers.0.mlp.up_proj.weight")
    assert mx.get_peak_memory() - before < taken.nbytes * 1.25
    # Nothing of it stays once the caller lets go.
    del taken
    assert mx.get_active_memory() <= before


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray[Any, Any]:
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wavelengths - 1) / 3
    middle = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < 2048, 1.0, np.where(wavelengths > 8192, factor, middle)).astype(np.float32)


def test_rope_scaling_in_the_words_of_mlx_lm(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "llama", "head_dim": 64, "rope_theta": 500000.0}
    model = make_model(config)

    def opened(factors: Any = None, **values: Any) -> Any:
        def edit(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
            metadata.update({f"llama.rope.scaling.{key}": value for key, value in values.items()})
            if factors is not None:
                tensors["rope_freqs.weight"] = (factors, Kind.F32)

        return open_source(write_gguf(tmp_path / "m.gguf", config, model, edit=edit))

    assert opened(type="linear", factor=4.0).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = opened(type="yarn", factor=4.0, original_context_length=64)
    assert yarn.config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = opened(llama3_factors(64, 500000.0, 32.0))
    assert llama3.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    rebuild(llama3)(mx.array([[1, 2, 3]]))
    # What mlx-lm makes of it divides the frequencies by just the stored factors.
    rope = rebuild(llama3).layers[0].self_attn.rope
    plain = 500000.0 ** (np.arange(0, 64, 2) / 64)
    assert np.allclose(np.array(rope._freqs) / plain, llama3_factors(64, 500000.0, 32.0), rtol=1e-4)
    assert "rope_scaling" not in opened(np.ones(32, np.float32)).config
    assert "rope_scaling" not in opened(type="none").config
    for bad in ({"factors": np.linspace(1, 3, 32, dtype=np.float32)}, {"type": "longrope"}, {"type": "yarn"}):
        with pytest.raises(SourceError, match="safetensors folder"):
            opened(**bad)


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "default", "gpt-2"])
def test_the_rebuilt_tokenizer_round_trips_and_renders(
    tmp_path: Path, llama: tuple[dict[str, Any], Any], pre: str
) -> None:
    source = open_source(write_gguf(tmp_path / "m.gguf", *llama, pre=pre))
    folder = tmp_path / "out"
    folder.mkdir()
    source.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(source.config))
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    digits = tokenizer.encode("123", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in digits] == {"smollm": ["1", "2", "3"], "qwen2": ["1", "2", "3"]}.get(
        pre, ["123"]
    )
    # The default of llama-bpe is to begin with bos, of the others not to.
    assert (tokenizer.encode("the")[0] == 1) is (pre == "llama-bpe")
    messages = [{"role": "user", "content": "the <tool> 12"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nthe <tool> 12<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert [ids.count(token) for token in (1, 2, 3)] == [2, 1, 1]
    assert tokenizer.decode(ids) == rendered
    # A control token is special and can be left out; a user-defined one is text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nthe <tool> 12\nassistant\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.model_max_length == 256
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 0],
    }  # fmt: skip


def test_gemma3_windows(tmp_path: Path) -> None:
    config = {**CONFIG, **GEMMA3, "num_hidden_layers": 6}
    model = make_model(config)

    def opened(**values: Any) -> dict[str, Any]:
        edit = change(**{f"gemma3__{key}": value for key, value in values.items()})
        return open_source(write_gguf(tmp_path / "m.gguf", config, model, edit=edit)).config

    default = opened(attention__sliding_window_pattern=None, rope__freq_base_swa=None)
    assert (default["sliding_window_pattern"], default["rope_local_base_freq"]) == (6, 10000.0)
    flags = opened(attention__sliding_window_pattern=[True, True, False] * 2)
    assert flags["sliding_window_pattern"] == 3
    none = opened(attention__sliding_window=None)
    assert "sliding_window" not in none
    assert none["sliding_window_pattern"] == 1
    scaled = opened(rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    for bad in (7, [True] * 6, [True, False] * 2, [True, False, True, True, False, True]):
        with pytest.raises(SourceError, match="windows do not recur within 6 layers"):
            opened(attention__sliding_window_pattern=bad)


def test_gemma2_has_no_place_for_rope_scaling(tmp_path: Path) -> None:
    config = {**CONFIG, **GEMMA2}
    edit = change(gemma2__rope__scaling__type="linear", gemma2__rope__scaling__factor=8.0)
    with pytest.raises(SourceError, match="mlx-lm's gemma2 has no place"):
        open_source(write_gguf(tmp_path / "m.gguf", config, make_model(config), edit=edit))


def gemma_source(folder: Path, metadata: dict[str, Any]) -> Any:
    config = {**CONFIG, **GEMMA3, "vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    edit = change(**{key.replace(".", "__"): value for key, value in metadata.items()})
    return open_source(write_gguf(folder / "m.gguf", config, make_model(config), edit=edit))


def random_texts() -> list[str]:
    dice = random.Random(0)
    letters = [
        "the",
        "hen",
        "aaa",
        "ab",
        "12",
        " ",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "<b>",
        *"abet12(x)=é東京текс😀€\u200b",
    ]
    mixed = ["".join(dice.choices(letters, k=dice.randrange(1, 60))) for _ in range(400)]
    repeated = [letter * count for letter in (*letters, "▁") for count in range(1, 40)]
    return [*TEXTS, "", " ", *mixed, *repeated]


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(
    tmp_path: Path, prefix: bool, byte_fallback: bool
) -> None:
    reference = train_sentencepiece(prefix=prefix, byte_fallback=byte_fallback)
    source = gemma_source(tmp_path, sentencepiece_metadata(reference, prefix=prefix))
    source.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=source.config["eos_token_id"])
    for text in random_texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        decoded = tokenizer.decode(ids)
        if byte_fallback:  # else SentencePiece shows what is unknown in its own way
            assert decoded == reference.decode(ids)
        detokenizer = tokenizer.detokenizer
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        # With a prefix, mlx-lm's own detokenizer drops all spaces at the beginning, and not one.
        assert detokenizer.text == (decoded.lstrip(" ") if prefix else decoded)
    # Text begins with bos, and a turn ends an answer, where the file says nothing of either.
    assert tokenizer.encode("the hen") == [reference.bos_id(), *reference.encode("the hen")]
    turn = reference.piece_to_id("<end_of_turn>")
    assert tokenizer.eos_token_ids == {reference.eos_id(), turn}
    assert tokenizer.encode("<end_of_turn>", add_special_tokens=False) == [turn]
    assert (tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token) == ("<s>", "<unk>", "<pad>")


def test_a_sentencepiece_vocabulary_that_contradicts_itself(tmp_path: Path) -> None:
    sound = sentencepiece_metadata(train_sentencepiece(prefix=False), prefix=False)
    scores = sound["tokenizer.ggml.scores"]
    tokens = ["twice" if token == "<0x41>" else token for token in sound["tokenizer.ggml.tokens"]]
    no_bytes = [5 if kind == 6 else kind for kind in sound["tokenizer.ggml.token_type"]]
    for values, words in (
        ({"scores": scores[:-1]}, f"{len(scores)} tokens and {len(scores) - 1} scores"),
        ({"scores": [float("nan"), *scores[1:]]}, "scores not finite"),
        ({"tokens": tokens}, "256 byte tokens, but not one for each byte"),
        ({"token_type": no_bytes, "unknown_token_id": None}, "neither byte tokens nor one for what is unknown"),
    ):
        source = gemma_source(tmp_path, sound | {f"tokenizer.ggml.{key}": value for key, value in values.items()})
        with pytest.raises(SourceError, match=words):
            source.write_tokenizer(tmp_path)
    for values, words in (
        ({"scores": [1, 2, 3]}, "scores is not a list of float"),
        ({"scores": None}, r"lacks the metadata tokenizer\.ggml\.scores"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"eot_token_id": 10_000}, "eot_token_id is 10000"),
    ):
        changed = sound | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        with pytest.raises(SourceError, match=words):
            gemma_source(tmp_path, changed)


@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_added_where_the_file_says_so(tmp_path: Path, llama: tuple[dict[str, Any], Any], adds: bool) -> None:
    def edit(values: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
        values.update({"tokenizer.ggml.add_bos_token": adds, "tokenizer.ggml.eot_token_id": 0})

    source = open_source(write_gguf(tmp_path / "m.gguf", *llama, pre="llama-bpe", edit=edit))
    assert source.config["eos_token_id"] == [2, 0]
    source.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=source.config["eos_token_id"])
    assert (tokenizer.encode("the")[0] == 1) is adds
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1
    assert tokenizer.eos_token_ids == {0, 2}


def change(**values: Any) -> Callable[[dict[str, Any], dict[str, tuple[Any, Kind]]], None]:
    """An edit that sets metadata, `__` for a dot; None removes the key."""

    def edit(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
        for key, value in values.items():
            metadata.pop(key.replace("__", "."), None)
            if value is not None:
                metadata[key.replace("__", ".")] = value

    return edit


def drop_tensor(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def add_tensor(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
    tensors["blk.1.ffn_gate_inp.weight"] = (np.zeros((4, 64), np.float32), Kind.F32)


def foreign_type(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
    tensors["blk.0.ffn_up.weight"] = (tensors["blk.0.ffn_up.weight"][0], Kind.MXFP4)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change(general__architecture="phi3"), ["'phi3'", "llama, qwen2, qwen3, gemma, gemma2, gemma3"]),
        (change(general__type="adapter"), ["adapter"]),
        (change(split__count=3), ["3 parts", "llama-gguf-split"]),
        (change(llama__block_count=None), ["lacks the metadata llama.block_count"]),
        (change(llama__block_count=9_000_000), ["9000000 layers"]),
        (change(llama__block_count=3), ["lacks blk.2.attn_k.weight", "and 6 more"]),
        (change(llama__embedding_length=128), ["has shape", "asks for"]),
        (change(llama__attention__head_count="four"), ["head_count is not of type int"]),
        (change(llama__attention__head_count_kv=[2, 2]), ["head_count_kv is not of type int"]),
        (change(llama__rope__dimension_count=8), ["8 of it rotated"]),
        (change(llama__expert_count=8), ["llama.expert_count"]),
        (change(llama__attention__layer_norm_rms_epsilon=0.0), ["layer_norm_rms_epsilon is 0.0"]),
        (change(tokenizer__ggml__model="t5"), ["kind ('t5') is not supported yet", "safetensors folder"]),
        (change(tokenizer__ggml__model="llama"), ["lacks the metadata tokenizer.ggml.scores"]),
        (change(llama__attn_logit_softcapping=50.0), ["llama.attn_logit_softcapping"]),
        (change(tokenizer__ggml__pre="tekken"), ["'tekken'", "not supported yet", "safetensors folder"]),
        (change(tokenizer__ggml__pre=None), ["not supported yet"]),
        (change(tokenizer__ggml__model=None), ["has no tokenizer"]),
        (change(tokenizer__ggml__merges=None), ["lacks the metadata tokenizer.ggml.merges"]),
        (change(tokenizer__ggml__tokens=[1, 2, 3]), ["tokenizer.ggml.tokens is not a list of str"]),
        (change(tokenizer__ggml__eos_token_id=10_000), ["eos_token_id is 10000"]),
        (drop_tensor, ["lacks blk.1.ffn_up.weight"]),
        (add_tensor, ["has blk.1.ffn_gate_inp.weight"]),
        (foreign_type, ["blk.0.ffn_up.weight", "MXFP4"]),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_at_opening(
    tmp_path: Path, llama: tuple[dict[str, Any], Any], edit: Any, words: list[str]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama, edit=edit)
    with pytest.raises(SourceError) as caught:
        open_source(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (change(tokenizer__ggml__tokens=[*TOKENS[:-1], TOKENS[5]]), f"{len(TOKENS) - 1} of them different"),
        (change(tokenizer__ggml__token_type=[1]), "1 types"),
        (change(tokenizer__ggml__merges=["ab"]), "not two tokens"),
        (change(tokenizer__ggml__merges=["Ġ notthere"]), "do not fit together"),
    ],
)
def test_a_vocabulary_that_contradicts_itself(
    tmp_path: Path, llama: tuple[dict[str, Any], Any], edit: Any, word: str
) -> None:
    source = open_source(write_gguf(tmp_path / "m.gguf", *llama, edit=edit))
    with pytest.raises(SourceError, match=word):
        source.write_tokenizer(tmp_path)


def test_not_a_gguf_file(tmp_path: Path, llama: tuple[dict[str, Any], Any]) -> None:
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 something else"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"m\.gguf: (is empty|cut off|is not a GGUF)"):
            open_source(path)
    for version, word in ((1, "version 1"), (3 << 24, "big-endian")):
        path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(64))
        with pytest.raises(SourceError, match=word):
            open_source(path)
    # The hub's cache keeps files without their suffix.
    named = write_gguf(path, *llama)
    blob = tmp_path / "b179c9"
    named.rename(blob)
    assert open_source(blob).config["model_type"] == "llama"
    path.symlink_to(blob)
    assert open_source(path).config["model_type"] == "llama"


def read_whole(path: Path, folder: Path) -> bool:
    """Whether the file converts; anything but success and a one-line SourceError escapes."""
    try:
        source = open_source(path)
        for name in source.shapes:
            source.take(name)
        source.write_tokenizer(folder)
    except SourceError as exc:
        if not str(exc).startswith(str(path)) or "\n" in str(exc):
            raise
        return False
    return True


@pytest.mark.parametrize("error", [-2, -1, 1, 1 << 40])
def test_a_wrong_number_of_tensors_is_refused(tmp_path: Path, llama: tuple[dict[str, Any], Any], error: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama)
    content = bytearray(path.read_bytes())
    content[8:16] = (int.from_bytes(content[8:16], "little") + error).to_bytes(8, "little")
    path.write_bytes(content)
    assert not read_whole(path, tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, llama: tuple[dict[str, Any], Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama, kind=Kind.Q4_1)
    assert read_whole(path, tmp_path)
    content = path.read_bytes()
    last = max(tensor.start + tensor.size for tensor in open_source(path)._tensors.values())  # type: ignore[attr-defined]
    for cut in [*range(0, last, last // 50), last - 1]:
        path.write_bytes(content[:cut])
        assert not read_whole(path, tmp_path), cut


def test_a_file_cut_after_opening_is_refused(tmp_path: Path, llama: tuple[dict[str, Any], Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SourceError, match="cut short while it was read"):
        rebuild(source)
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        source.take("model.norm.weight")


def test_a_damaged_header_never_escapes_as_another_error(tmp_path: Path, llama: tuple[dict[str, Any], Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama, kind=Kind.Q8_0)
    content = path.read_bytes()
    header = min(tensor.start for tensor in open_source(path)._tensors.values())  # type: ignore[attr-defined]
    vocabulary = content.index(b"tokenizer.ggml.tokens"), content.index(b"tokenizer.ggml.merges")
    # Most of the header is the vocabulary; the rest is where damage matters.
    places = [at for at in range(header) if not vocabulary[0] + 60 < at < vocabulary[1]]
    dice = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[dice.choice(places)] = dice.choice([0, 1, 127, 255, dice.randrange(256)])
        path.write_bytes(damaged)
        read_whole(path, tmp_path)
