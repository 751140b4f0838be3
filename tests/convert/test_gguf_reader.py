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
from tests.tiny_gguf import CONFIG, TOKENS, make_model, write_gguf

TEXTS = [
    "def f(x):\n\treturn x ** 2  # été",
    "naïve 東京 😀👩‍👩‍👧 ½",
    "In 2024, 12345 people\r\n\r\n  paid €3.50!",
    " don't we'll ",
]


def rebuild(source: Any) -> Any:
    model_class, args_class = _get_classes(source.config)
    model = model_class(args_class.from_dict(source.config))
    model.load_weights([(name, source.take(name)) for name in source.shapes], strict=True)
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
    assert (source.config["bos_token_id"], source.config["eos_token_id"]) == (1, 2)
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


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_read(tmp_path: Path, kind: Kind) -> None:
    config = {**CONFIG, "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (256, 256 // block * size), dtype=np.uint8)

    def edit(values: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
        tensors["blk.0.ffn_up.weight"] = (raw, kind)

    path = write_gguf(tmp_path / "m.gguf", config, make_model(config), edit=edit)
    taken = np.array(open_source(path).take("model.layers.0.mlp.up_proj.weight"))
    assert np.array_equal(taken, dequantize(raw, kind), equal_nan=True)


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
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip


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
        (change(general__architecture="gemma2"), ["'gemma2'", "llama, qwen2, qwen3"]),
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
        (change(tokenizer__ggml__model="llama"), ["kind ('llama') is not supported yet", "safetensors folder"]),
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
